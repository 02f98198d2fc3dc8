# SPDX-License-Identifier: Apache-2.0
"""What the documents promise is there: commands, links, files, ranges, figures. No network.

`python tests/test_readme.py --write` renews the table of results from benchmarks/results/*.json.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_d2f.d2f import D2FParams
from vllm_d2f.settings import MAX_WINDOW, PRESETS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "patches/README.md")


def blocks(language: str, text: str = README + CONTRIBUTING) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(first: str) -> list[list[str]]:
    """Commands of the shell blocks that begin with a word, split, without comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and words[0] == first]


def unique(items: list) -> list:
    return sorted(set(items))


@pytest.mark.parametrize("module", unique([words[2] for words in commands("python")]))
def test_commands_of_python_take_help(module):
    assert all(words[1] == "-m" for words in commands("python"))
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for words in commands("python"):
        if words[2] == module:
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


@pytest.mark.parametrize("words", commands("vllm"), ids=" ".join)
def test_serve_commands_parse(words):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_d2f.settings import settings_from_dict

    program, verb, *arguments = words
    assert (program, verb) == ("vllm", "serve")
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    if section := (parsed.additional_config or {}).get("d2f"):
        settings_from_dict(section)


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
    text = (ROOT / document).read_text()
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        assert not path or ((ROOT / document).parent / path).exists(), link
        assert path or anchor in headings, link


def listed() -> dict[str, str]:
    """The file tree: path -> purpose."""
    (tree,) = [block for block in blocks("text", README) if "vllm_d2f/d2f.py" in block]
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in tree.splitlines())


def test_the_file_tree_is_complete():
    for path, purpose in listed().items():
        assert purpose and (ROOT / path).exists(), path
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_d2f").glob("*.py")}
    assert modules <= listed().keys()
    folders = {f"{path.name}/" for path in ROOT.iterdir() if any(path.glob("*.py"))}
    assert folders - {"vllm_d2f/"} <= listed().keys()


def test_the_table_of_settings_is_right():
    defaults = D2FParams()
    rows = {}
    for line in README.splitlines():
        cells = [cell.strip("` ") for cell in line.strip("|").split("|")]
        if len(cells) == 5:
            rows[cells[0]] = cells[1:]
    for name in D2FParams.__dataclass_fields__:
        assert rows[name][0] == f"d2f_{name}"
        assert rows[name][2] == str(getattr(defaults, name))
    assert rows["window"][1] == f"up to {MAX_WINDOW}"
    for preset in PRESETS:
        assert f"`{preset}`" in README


def test_the_picture_is_that_of_the_algorithm():
    from vllm_d2f import d2f

    (picture,) = [part for part in (d2f.__doc__ or "").split("\n\n") if "[ P P P P ]" in part]
    assert picture in README


# The table of results

BEGIN, END = "<!-- results: python tests/test_readme.py --write -->\n", "<!-- end of results -->"


def results() -> str:
    """The table of results as Markdown. A figure without a file does not appear."""
    rows = [*tiny_rows(), *demo_rows(), *throughput_rows(), *parity_rows(), *overhead_rows()]
    rows += streaming_rows()
    head = ["| what | result | where | command |", "|---|---|---|---|"]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


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


def parity_rows() -> Iterator[tuple[str, ...]]:
    for path in sorted(RESULTS.glob("parity*.json")):
        report = json.loads(path.read_text())
        ways = report["ways"].values()
        equal = f"{sum(way['equal'] for way in ways)} of {sum(way['of'] for way in ways)} equal"
        if ties := sum(way["ties"] for way in ways):
            equal += f", {ties} decided by a tie"
        what = (
            f"answers and forwards as the reference: {report['model']}, {len(ways)} ways, "
            f"{report['prompts']} prompts x {report['settings']} settings"
        )
        yield what, equal, report["machine"], f"`{report['command']}`"


def overhead_rows() -> Iterator[tuple[str, ...]]:
    if report := load("overhead.json"):
        added = "<br>".join(
            f"{row['requests']} request{'s' * (row['requests'] > 1)}: {row['added_cpu_ms']:.2f} ms"
            for row in report["rows"]
        )
        where = f"CPU, {report['threads']} thread, windows of {report['window']}"
        yield "what the plugin adds to a step", added, where, f"`{report['command']}`"


def rendered(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + results() + END + rest.partition(END)[2]


def test_the_table_of_results_is_that_of_the_files():
    assert BEGIN in README and END in README
    assert rendered(README) == README, "run: python tests/test_readme.py --write"


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    (ROOT / "README.md").write_text(rendered(README))
