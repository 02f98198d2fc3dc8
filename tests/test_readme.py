# SPDX-License-Identifier: Apache-2.0
"""What README.md and the user's pages promise is there: commands, links, figures. No network.

`python tests/test_readme.py --write` renews the figures of README.md and docs/results.md from
benchmarks/results/*.json. `test_docs.py` holds the other pages to the code.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
PAGES = ("CONTRIBUTING.md", "docs/api.md", "docs/decoding.md", "docs/serving.md")
TEXT = README + "".join((ROOT / page).read_text() for page in (*PAGES, "docs/training.md"))
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("*/README.md") if path.parts[-2] != "docs"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)


def blocks(language: str, text: str = TEXT) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(first: str) -> list[list[str]]:
    """Commands of the shell blocks that begin with a word, split, without comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and words[0] == first]


def unique(items: list) -> list:
    return sorted(set(items))


def program(words: list[str]) -> tuple[str, ...]:
    """Return the module of a `python -m` line, and its subcommand if it has one."""
    return tuple(words[2:4] if words[3:] and words[3].isalpha() else words[2:3])


@pytest.mark.parametrize("module", unique([program(words) for words in commands("python")]))
def test_commands_of_python_take_help(module):
    assert all(words[1] == "-m" for words in commands("python"))
    done = subprocess.run(
        [sys.executable, "-m", *module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for words in commands("python"):
        if program(words) == module:
            for option in words[3:]:
                assert not option.startswith("--") or option in done.stdout


@pytest.mark.parametrize("target", unique([words[1] for words in commands("make")]))
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        f"make {target}"
        in subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    )


def test_the_request_is_json_for_an_embedded_model():
    from vllm_d2f.hub.names import EMBEDDED

    (curl,) = commands("curl")
    body = json.loads(curl[curl.index("-d") + 1])
    assert body["model"] in EMBEDDED and body["prompt"]


def test_the_offline_example_answers(tmp_path):
    (example,) = [block for block in blocks("python") if "from vllm import LLM" in block]
    file = tmp_path / "example.py"
    file.write_text(example)
    done = subprocess.run(
        [sys.executable, file],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "73+24=97-17=80" in done.stdout.splitlines()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path) if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def headings(page: Path) -> set[str]:
    """Return the anchors of a page."""
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    }


def test_readme_is_short():
    assert len(README.encode()) <= 8192


# Figures

MARKS = {
    "README.md": "figures",
    "docs/results.md": "results",
}
"""Document -> name of its generated part, which is the name of a function here."""


def figures() -> str:
    """Return the few figures of README.md as Markdown."""
    rows = [*real_rows()]
    if report := load("throughput.json"):
        ratio = {row["batch_size"]: row["ratio"]["median"] for row in report["d2f_vs_ar"]}
        scores = f"{100 * report['exact_d2f']:.1f} % against {100 * report['exact_ar']:.1f} %"
        what = "answer tokens per second of d2f-tiny, against ar-tiny in the same vLLM"
        at_once = ", ".join(f"{ratio[n]:.2f}x for {n}" for n in (8, 256))
        rows.append((what, f"{ratio[1]:.2f}x for 1 request at a time, {at_once}"))
        rows.append(("answers that are exactly right, d2f-tiny against ar-tiny", scores))
    if report := load("tiny_training.json"):
        tokens = report["figures"]["d2f-tiny"]["tokens_per_forward"]
        rows.append(("tokens per forward pass (ar-tiny: 1)", f"{tokens:.2f}"))
    ways = [way for _, report in parity_reports() for way in report["ways"].values()]
    equal = f"{sum(way['equal'] for way in ways):,} of {sum(way['of'] for way in ways):,}"
    rows.append(("answers with the tokens and forward passes of the reference loop", equal))
    rows.append(("published 7B and 8B models", "not run yet"))
    return table(["what", "result"], rows)


def real_rows() -> Iterator[tuple[str, str]]:
    """Yield the pretrained model against its twin, and against what a user would pick instead."""
    every, report = load("versus_extract_all.json"), load("versus_extract.json")
    if every and report:
        at = {
            (point["decoder"], point["batch_size"]): point["against_ar"]["median"]
            for point in (*report["points"], *every["points"])
        }
        what = "tokens per second of SmolLM2-135M with D2F, against its autoregressive twin"
        d2f, ngram = (
            [f"{at[decoder, size]:.2f}x" for size in (1, 64)] for decoder in ("d2f", "ar+ngram")
        )
        speeds = f"{d2f[0]} for 1 request at a time, {d2f[1]} for 64"
        yield what, f"{speeds}; the twin with n-gram speculation {ngram[0]} and {ngram[1]}"
        scores = every["scores"]
        d2f, ar = (f"{100 * scores[key]['score']:.1f} %" for key in ("d2f", "ar"))
        new = " against ".join(
            f"{100 * scores[key]['slots_unseen']:.1f} %" for key in ("d2f", "ar")
        )
        what = f"facts that are right, of {scores['d2f']['answers']:,} sentences with eight each"
        yield what, f"{d2f} against {ar}; of restaurants that training never named {new}"


def results() -> str:
    """Return the table of results as Markdown. A figure without a file does not appear."""
    rows = [*tiny_rows(), *demo_rows(), *throughput_rows(), *parity_rows(), *overhead_rows()]
    rows += [*streaming_rows(), *versus_rows()]
    return table(["what", "result", "where", "command"], rows)


def table(head: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def load(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def tiny_rows() -> Iterator[tuple[str, ...]]:
    if report := load("tiny_training.json"):
        figures, where = report["figures"], report["machine"]
        how = report["decoding"]
        scores = "<br>".join(
            f"{name}, {how[name]} {100 * f['exact']:.1f} %" for name, f in figures.items()
        )
        student = figures["d2f-tiny"]
        what = f"{student['problems']:.0f} held-out problems answered to the letter"
        yield what, scores, where, f"`{report['command']}`"
        speed = f"d2f-tiny {student['tokens_per_forward']:.2f}"
        yield "tokens per forward, up to the end token", speed, where, f"`{report['command']}`"


def demo_rows() -> Iterator[tuple[str, ...]]:
    if report := load("demo_cpu.json"):
        speeds = "<br>".join(
            f"{f['model']} {f['batch_tokens_per_s']:.0f} in one batch, "
            f"{f['single_tokens_per_s']:.0f} one by one, {f['right']} of {f['problems']} right"
            for f in report["figures"]
        )
        machine = report["machine"]
        where = f"{machine['system']}, {machine['threads']} thread, float32"
        command = "`python -m vllm_d2f.demo --json FILE`"
        yield "tokens per second, 16 problems", speeds, where, command


def throughput_rows() -> Iterator[tuple[str, ...]]:
    if report := load("throughput.json"):
        ratios = "<br>".join(
            f"{row['batch_size']} at once: {row['ratio']['median']:.2f}x"
            for row in report["d2f_vs_ar"]
            if row["batch_size"] in (1, 8, 64, 256)
        )
        scores = f"exact {100 * report['exact_d2f']:.1f} % against {100 * report['exact_ar']:.1f} %"
        hardware, command = report["hardware"], f"`{report['command']}`"
        where = f"{hardware['cpu']}, {hardware['cores']} cores, one thread each"
        what = "useful tokens per second, d2f-tiny / ar-tiny in the same vLLM"
        yield what, f"{ratios}<br>{scores} of {report['score_problems']['d2f']}", where, command
        vanilla = "<br>".join(
            f"canvas {row['setting'].replace(':', ', tokens per step ')}: "
            f"{row['ratio']['answers']['median']:.0f}x, {100 * row['score_vanilla']:.0f} % right"
            for row in report["d2f_vs_vanilla"]
        )
        yield (
            "time per answer, dream-tiny decoded the vanilla way / d2f-tiny",
            vanilla,
            where,
            command,
        )


def streaming_rows() -> Iterator[tuple[str, ...]]:
    if report := load("streaming.json"):
        times = "<br>".join(
            f"{at_once} at once: {ways['prefix']['first_token_ms']:.1f} ms, "
            f"whole blocks {ways['block']['first_token_ms']:.1f} ms"
            for at_once, ways in report["at_once"].items()
        )
        yield "time to first token", times, report["machine"], f"`{report['command']}`"


def parity_reports() -> list[tuple[str, dict]]:
    """Return every comparison with the reference loop, by its file's name."""
    paths = sorted(RESULTS.glob("parity*.json"))
    return [(path.name, json.loads(path.read_text())) for path in paths]


def parity_rows() -> Iterator[tuple[str, ...]]:
    for _, report in parity_reports():
        ways = report["ways"].values()
        equal = f"{sum(way['equal'] for way in ways)} of {sum(way['of'] for way in ways)} equal"
        if ties := sum(way["ties"] for way in ways):
            equal += f", {ties} decided by a tie"
        what = (
            f"answers and forward passes as the reference loop: {report['model']}, "
            f"{len(ways)} ways, {report['prompts']} prompts x {report['settings']} settings"
        )
        yield what, equal, report["machine"], f"`{report['command']}`"


def versus_rows() -> Iterator[tuple[str, ...]]:
    """One row for each job of a real language model."""
    for path in sorted(RESULTS.glob("versus_*.json")):
        report = json.loads(path.read_text())
        hardware, score = report["hardware"], report["score"].replace("_", " ")
        lines = [
            f"{name}: {score} {100 * row['score']:.1f} % of {row['answers']} answers, "
            f"{row['tokens_per_forward']:.2f} tokens per forward, "
            + ", ".join(
                f"{point['against_ar']['median']:.2f}x at {point['batch_size']}"
                for point in report["points"]
                if point["decoder"] == name
            )
            for name, row in report["scores"].items()
        ]
        what = f"{report['models']['d2f']} and its twin: tokens per second over the twin's"
        where = f"{hardware['cpu']}, {hardware['threads']} thread each"
        yield what, "<br>".join(lines), where, f"`{report['command']}`"


def overhead_rows() -> Iterator[tuple[str, ...]]:
    if report := load("overhead.json"):
        added = "<br>".join(
            f"{row['requests']} request{'s' * (row['requests'] > 1)}: {row['added_cpu_ms']:.2f} ms"
            for row in report["rows"]
        )
        where = f"CPU, {report['threads']} thread, windows of {report['window']}"
        yield "what the plugin adds to a step", added, where, f"`{report['command']}`"


def rendered(document: str) -> str:
    """Return a document with its generated part renewed."""
    name = MARKS[document]
    begin = f"<!-- {name}: python tests/test_readme.py --write -->\n"
    end = f"<!-- end of {name} -->"
    before, found, rest = (ROOT / document).read_text().partition(begin)
    assert found and end in rest
    return before + begin + globals()[name]() + end + rest.partition(end)[2]


@pytest.mark.parametrize("document", MARKS)
def test_the_figures_are_those_of_the_files(document):
    renew = "run: python tests/test_readme.py --write"
    assert rendered(document) == (ROOT / document).read_text(), renew


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    for document in MARKS:
        (ROOT / document).write_text(rendered(document))
