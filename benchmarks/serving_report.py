# SPDX-License-Identifier: Apache-2.0
"""The tables and the plot of `benchmarks.serving`."""

from pathlib import Path
from typing import Any

from benchmarks.plots import label_simulated, legend_below, new_figure, plain_ticks, save
from benchmarks.throughput_report import simulation_note

UNITS = {
    "request_rate": "requests per second on offer, Poisson arrivals; inf: all at once",
    "requests_per_s": "requests per second completed, median of the runs",
    "spread": "lowest and highest run",
    "tokens_per_s": "output tokens per second; answers end by themselves, so all are useful",
    "first_token_ms": "milliseconds until the first tokens arrive",
    "per_token_ms": "milliseconds per further token, per request; near 0 where a whole answer "
    "arrives in one piece",
    "request_ms": "milliseconds until the answer is complete: the figure to compare",
    "tokens_per_forward": "counters: committed tokens / denoising forwards of a request",
    "positions_per_token": "counters: window positions computed / committed tokens",
    "exact": "fraction of answers right to the letter",
    "final": "fraction of answers that end by themselves with the right number",
}
COLUMNS = (
    "model",
    "rate offered",
    "requests/s",
    "tokens/s",
    "request ms p50 / p99",
    "first token ms p50 / p99",
    "tokens/forward",
    "failed",
    "exact %",
    "final %",
)


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, one line per model and rate."""
    lines = [
        "# Serving under Poisson arrivals",
        "",
        *[line for found in report["models"].values() for line in simulation_note(found)],
        f"`{report['command']}` on {report['hardware']['cpu']},",
        f"{report['hardware']['cores']} cores, {report['hardware']['threads']} thread(s) each.",
        f"{report['prompts']} problems per run, median of {report.get('runs', 1)} run(s);",
        f"at most {report['max_tokens']} tokens, greedy,",
        f"at most {report['max_num_seqs']} requests at once. Client and server share the machine.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for model, found in report["models"].items():
        for point in found["points"]:
            cells = (
                model,
                point["request_rate"],
                _spread(point, "requests_per_s", ".2f"),
                _spread(point, "tokens_per_s", ".0f"),
                _pair(point["request_ms"]),
                _pair(point["first_token_ms"]),
                point.get("tokens_per_forward", "1 (AR)"),
                point["failed"],
                f"{100 * point['score']['exact']:.1f}",
                f"{100 * point['score']['final']:.1f}",
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    for model, found in report["models"].items():
        exact, final = (100 * found["score"][k] for k in ("exact", "final"))
        lines.append(
            f"- {model}, the same problems by /v1/completions: exact {exact:.1f} %, "
            f"final {final:.1f} %"
        )
    for model, found in report.get("vllm_bench_throughput", {}).items():
        if "failed" in found:
            lines.append(f"- `vllm bench throughput` on {model} **failed**")
            continue
        lines.append(
            f"- `vllm bench throughput` on {model}, offline, {found['num_requests']} random "
            f"prompts: {found['requests_per_second']:.2f} requests/s, "
            f"{found['tokens_per_second']:.0f} tokens/s ({found['note']})"
        )
    return "\n".join(lines)


def _spread(point: dict[str, Any], name: str, form: str) -> str:
    low, high = point.get("spread", {}).get(name, (None, None))
    runs = "" if low is None else f" ({low:{form}} to {high:{form}})"
    return f"{point[name]:{form}}{runs}"


def _pair(values: dict[str, float]) -> str:
    return f"{values['p50']:.0f} / {values['p99']:.0f}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Time to the complete answer against the rate on offer."""
    figure, axes = new_figure(height=5.2)
    # Everything at once has no rate: a place of its own at the right.
    offered = [p["request_rate"] for f in report["models"].values() for p in f["points"]]
    rates = sorted({rate for rate in offered if rate != "inf"})
    ticks = {**{rate: f"{rate:g}" for rate in rates}}
    at_once = 4 * rates[-1] if rates else 1
    if "inf" in offered:
        ticks[at_once] = "all at once"
    for color, (model, found) in zip(
        ("#1b6ca8", "#d1495b", "#6a994e", "#7a7a7a"), report["models"].items(), strict=False
    ):
        where = [at_once if p["request_rate"] == "inf" else p["request_rate"]
                 for p in found["points"]]  # fmt: skip
        exact = 100 * found["score"]["exact"]
        for name, style in (("p50", "o-"), ("p99", "o:")):
            times = [p["request_ms"][name] for p in found["points"]]
            label = f"{model} {name}, {exact:.1f} % right"
            axes.plot(where, times, style, color=color, label=label)
        label_simulated(axes, found)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes, within_decades=True)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="requests per second on offer", ylabel="milliseconds to the complete answer")
    axes.grid(alpha=0.3)
    legend_below(axes)
    save(figure, path)
