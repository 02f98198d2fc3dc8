# SPDX-License-Identifier: Apache-2.0
"""The tables and the plot of `benchmarks.serving`."""

from pathlib import Path
from typing import Any

UNITS = {
    "request_rate": "requests per second on offer, Poisson arrivals; inf: all at once",
    "requests_per_s": "requests per second completed",
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
        f"`{report['command']}` on {report['hardware']['cpu']},",
        f"{report['hardware']['cores']} cores, {report['hardware']['threads']} thread(s) each.",
        f"{report['prompts']} problems per run, at most {report['max_tokens']} tokens, greedy,",
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
                f"{point['requests_per_s']:.2f}",
                f"{point['tokens_per_s']:.0f}",
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


def _pair(values: dict[str, float]) -> str:
    return f"{values['p50']:.0f} / {values['p99']:.0f}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Time to the complete answer against the rate that was reached."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for color, (model, found) in zip(
        ("C0", "C1", "C2", "C3"), report["models"].items(), strict=False
    ):
        rate = [p["requests_per_s"] for p in found["points"]]
        exact = 100 * found["score"]["exact"]
        for name, style in (("p50", "o-"), ("p99", "o:")):
            times = [p["request_ms"][name] for p in found["points"]]
            label = f"{model} {name}, {exact:.1f} % right"
            axis.plot(rate, times, style, color=color, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("requests per second completed")
    axis.set_ylabel("milliseconds until the answer is complete")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
