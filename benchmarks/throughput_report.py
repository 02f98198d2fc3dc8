# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark's JSON and Markdown, from its measured runs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.points import UNITS, paired, paired_per_answer, point
from benchmarks.workload import SIMULATED

if TYPE_CHECKING:
    from benchmarks.throughput import Key, Runs

NOTE = {
    "d2f": "vLLM with vllm-d2f, V2 model runner",
    "ar": "stock vLLM, its default model runner",
    "vanilla": "plain transformers, full recomputation, batch size 1; LENGTH:TOKENS_PER_STEP",
}

COLUMNS = (
    "decoder", "batch", "useful tok/s", "answers/s", "tokens per forward", "computed per committed",
    "first token ms, p50 / p99", "per token ms, p50 / p99", "peak MiB", "score", "exact",
)  # fmt: skip


def build(
    runs: "Runs",
    about: Mapping[str, Any],
    names: Mapping[str, str],
    max_tokens: int,
    has_text: bool,
    simulated: float | None = None,
) -> dict[str, Any]:
    """The report. What a reader looks for first stands at its top.

    `simulated`: tokens per forward that were made up, None where the models decided.
    """
    points = [
        {"kind": key.kind, "mode": key.mode, "batch_size": key.batch_size, **point(done, has_text)}
        for key, done in runs.items()
    ]
    points.sort(key=lambda p: (list(NOTE).index(p["kind"]), p["mode"], p["batch_size"]))
    against_ar = _against_ar(runs)
    # Graded at the batch size with the most problems; vanilla diffusion by setting, as they differ.
    largest = {
        kind: max((p for p in points if p["kind"] == kind), key=lambda p: p["problems"])
        for kind in names
        if kind != "vanilla"
    }
    vanilla = [p for p in points if p["kind"] == "vanilla"]
    return {
        "benchmark": "throughput",
        "speedup_vs_ar_batch1": next(
            (row["ratio"]["median"] for row in against_ar if row["batch_size"] == 1), None
        ),
        **{f"score_{kind}": p["score"] for kind, p in largest.items()},
        **{f"exact_{kind}": p["exact"] for kind, p in largest.items()},
        "score_problems": {kind: p["problems"] for kind, p in largest.items()},
        "score_vanilla": {p["mode"]: p["score"] for p in vanilla},
        "simulated_tokens_per_forward": simulated,
        "models": {kind: f"{name} ({NOTE[kind]})" for kind, name in names.items()},
        "max_tokens": max_tokens,
        **about,
        "units": UNITS,
        "d2f_vs_ar": against_ar,
        "d2f_vs_vanilla": _against_vanilla(runs, points),
        "points": points,
    }


def best(runs: "Runs", kind: str, batch_size: int) -> "Key | None":
    """The mode (eager or compiled) in which a decoder was faster at this batch size."""
    keys = [key for key in runs if key.kind == kind and key.batch_size == batch_size]

    def median(key: "Key") -> float:
        return point(runs[key], False)["useful_tokens_per_s"]["median"]

    return max(keys, key=median, default=None)


def _against_ar(runs: "Runs") -> list[dict[str, Any]]:
    """Each decoder in its own best mode, at every batch size."""
    rows = []
    for size in sorted({key.batch_size for key in runs if key.kind == "ar"}):
        d2f, ar = best(runs, "d2f", size), best(runs, "ar", size)
        if d2f and ar:
            rows.append(
                {
                    "batch_size": size,
                    "modes": {"d2f": d2f.mode, "ar": ar.mode},
                    "ratio": paired(runs[d2f], runs[ar]),
                    "same_mode": {
                        key.mode: paired(runs[key], runs[twin])
                        for key in runs
                        for twin in runs
                        if (key.kind, twin.kind) == ("d2f", "ar")
                        and key.mode == twin.mode
                        and key.batch_size == twin.batch_size == size
                    },
                }
            )
    return rows


def _against_vanilla(runs: "Runs", points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    d2f = best(runs, "d2f", 1)
    scores = {p["mode"]: p["score"] for p in points if p["kind"] == "vanilla"}
    return [
        {
            "setting": key.mode,
            "score_vanilla": scores[key.mode],
            "ratio": paired_per_answer(runs[d2f], done),
        }
        for key, done in runs.items()
        if key.kind == "vanilla" and d2f
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of `benchmarks/results/throughput.md`."""
    hardware, versions = report["hardware"], report["versions"]
    lines = [
        "# Throughput",
        "",
        *simulation_note(report),
        f"`{report['command']}`",
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s) each.",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        *[f"- {kind}: {text}" for kind, text in report["models"].items()],
        "",
        "Useful tokens are those up to and including the end token. Ranges are over the runs.",
        "",
    ]
    if report["d2f_vs_ar"]:
        lines += [
            "| batch size | D2F / AR, each in its faster mode | modes |",
            "|---|---|---|",
            *[
                f"| {row['batch_size']} | {_range(row['ratio'], 'x')} | D2F "
                f"{row['modes']['d2f']}, AR {row['modes']['ar']} |"
                for row in report["d2f_vs_ar"]
            ],
            "",
        ]
    if report["d2f_vs_vanilla"]:
        lines += [
            "| vanilla | score | time per answer, vanilla / D2F | useful tokens/s, D2F / vanilla |",
            "|---|---|---|---|",
            *[
                f"| {row['setting']} | {row['score_vanilla']:.1%} | "
                f"{_range(row['ratio']['answers'], 'x')} | {_range(row['ratio']['tokens'], 'x')} |"
                for row in report["d2f_vs_vanilla"]
            ],
            "",
        ]
    lines += [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for p in report["points"]:
        first, token = p["time_to_first_token_ms"], p["time_per_token_ms"]
        exact = "" if p["exact"] is None else f"{p['exact']:.1%}"
        lines.append(
            f"| {p['kind']} {p['mode']} | {p['batch_size']} | {_range(p['useful_tokens_per_s'])} | "
            f"{p['requests_per_s']['median']:.3g} | {p['tokens_per_forward']:.2f} | "
            f"{p['computed_per_committed']:.1f} | {first['p50']:.0f} / {first['p99']:.0f} | "
            f"{token['p50']:.2f} / {token['p99']:.2f} | {p['peak_mib']} | {p['score']:.1%} of "
            f"{p['problems']} | {exact} |"
        )
    return "\n".join(lines)


def simulation_note(report: Mapping[str, Any]) -> list[str]:
    """Lines that say that acceptance was simulated, none where it was not."""
    made_up = report.get("simulated_tokens_per_forward")
    return [] if made_up is None else [SIMULATED.format(made_up), ""]


def _range(values: Mapping[str, float], unit: str = "") -> str:
    def text(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    return f"{text(values['median'])}{unit} ({text(values['min'])} to {text(values['max'])})"
