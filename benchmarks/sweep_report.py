# SPDX-License-Identifier: Apache-2.0
"""From measurements of `benchmarks.sweep` to the frontier, the paper's tables and its figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import new_figure, save

NAMES = ("block_size", "max_blocks", "tau_add", "tau_act", "tau_conf")
COLUMNS = (
    "tokens/forward",
    "useful tokens/s (runs)",
    "per CPU s",
    "exact % (95 %)",
    "final %",
)
UNITS = {
    "tokens_per_forward": "useful tokens per forward a request took part in",
    "tokens_per_s": "useful tokens (up to the end token, it included) per second, median of runs",
    "tokens_per_s_range": "slowest and fastest run",
    "tokens_per_cpu_s": "useful tokens per second of this process's CPU time, median of runs: the "
    "speed to compare where other programs share the machine",
    "exact": "fraction of answers right to the letter",
    "final": "fraction of answers that end by themselves with the right number",
    "exact_ci95": "95 % interval (Wilson) of `exact`",
    "pareto_forward": "no other point has more tokens per forward and a score as high, or the same "
    "and a higher one",
    "pareto_speed": "the same by tokens per second",
}


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % interval of a fraction."""
    z, p = 1.96, right / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(worse: set[int], better: set[int]) -> float:
    """How likely chance alone makes two points differ so much on the same problems.

    Args:
        worse, better: the problems each got wrong.
    """
    only_worse, only_better = len(worse - better), len(better - worse)
    total, least = only_worse + only_better, min(only_worse, only_better)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(least + 1)) / 2**total)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (speed, score): nothing is at least as good in both and better in one."""
    return [
        not any(
            other[0] >= speed and other[1] >= score and other != (speed, score) for other in points
        )
        for speed, score in points
    ]


def build_report(
    about: dict[str, Any], base: dict[str, Any], measurements: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The result file: one row per point, the frontier marked, and whether it is flat."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in measurements:
        groups.setdefault(tuple(one["params"][name] for name in NAMES), []).append(one)
    rows = [_row(runs) for runs in groups.values()]
    for mark, speed in (("pareto_forward", "tokens_per_forward"), ("pareto_speed", "tokens_per_s")):
        for row, best in zip(rows, pareto([(r[speed], r["exact"]) for r in rows]), strict=True):
            row[mark] = best
    lowest, highest = (f(rows, key=lambda r: r["exact"]) for f in (min, max))
    wrong = {key: set(runs[0]["wrong"]) for key, runs in groups.items()}
    chance = sign_test(*(wrong[tuple(row[n] for n in NAMES)] for row in (lowest, highest)))
    return {
        "score": {
            "lowest": lowest["exact"],
            "highest": highest["exact"],
            "chance": round(chance, 5),
        },
        # Only a difference that chance hardly makes is a trade of score for speed.
        "flat": chance > 0.05,
        "base": base,
        **about,
        "units": UNITS,
        "rows": rows,
    }


def _row(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    speeds = [run["useful"] / run["seconds"] for run in runs]
    exact = first["exact"] / first["problems"]
    return {
        **first["params"],
        "tokens_per_forward": round(first["useful"] / first["forwards"], 3),
        "tokens_per_s": round(statistics.median(speeds), 1),
        "tokens_per_s_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "tokens_per_cpu_s": round(
            statistics.median(run["useful"] / run["cpu_seconds"] for run in runs), 1
        ),
        "runs": len(runs),
        "exact": round(exact, 4),
        "exact_ci95": [round(x, 4) for x in wilson(first["exact"], first["problems"])],
        "final": round(first["final"] / first["problems"], 4),
    }


def verdict(report: dict[str, Any]) -> str:
    """What the frontier looks like, in one sentence."""
    low, high = (100 * report["score"][k] for k in ("lowest", "highest"))
    if report["flat"]:
        return (
            f"**The frontier is flat**: scores lie between {low:.1f} % and {high:.1f} %, which "
            f"{report['problems']} problems cannot tell apart. On this model and task the settings "
            "decide speed only."
        )
    return (
        f"Scores lie between {low:.1f} % and {high:.1f} % (same problems, sign test: p = "
        f"{report['score']['chance']:.2g}): within this grid speed can be bought with score."
    )


def markdown(report: dict[str, Any]) -> str:
    """The report as tables; points on a frontier first."""
    rows = sorted(report["rows"], key=lambda r: -r["tokens_per_forward"])
    threads = report["hardware"]["threads"]
    lines = [
        "# Speed against score",
        "",
        f"`{report['command']}` on {report['hardware']['cpu']}, {threads} thread(s).",
        f"{report['model']}, {report['problems']} problems ({report['data']}),",
        f"batch size {report['batch_size']}, at most {report['max_tokens']} tokens, greedy.",
        "",
        verdict(report),
        "",
        "Own settings of the model: "
        + ", ".join(f"{name} {report['base'][name]}" for name in NAMES)
        + ".",
        *_grid(report, "## tau_act = tau_conf against tau_add (paper: table 3)", _table_3(report)),
        *_grid(report, "## tau_conf against tau_act (paper: table 4, figure 2)", _table_4(report)),
        *_grid(report, "## Block size against max_blocks", _shapes(report)),
        "",
        "## All points",
        "",
        "F: on the frontier by tokens per forward, S: by useful tokens per second.",
        "",
        "| | " + " | ".join((*NAMES, *COLUMNS)) + " |",
        "|" + "---|" * (1 + len(NAMES) + len(COLUMNS)),
    ]
    for row in rows:
        mark = "F" * row["pareto_forward"] + "S" * row["pareto_speed"]
        slow, fast = row["tokens_per_s_range"]
        low, high = (100 * x for x in row["exact_ci95"])
        exact, final = 100 * row["exact"], 100 * row["final"]
        settings = " | ".join(str(row[name]) for name in NAMES)
        lines.append(
            f"| {mark} | {settings} | {row['tokens_per_forward']:.2f} | {row['tokens_per_s']:.0f} "
            f"({slow:.0f}-{fast:.0f}) | {row['tokens_per_cpu_s']:.0f} "
            f"| {exact:.1f} ({low:.1f}-{high:.1f}) | {final:.1f} |"
        )
    return "\n".join(lines)


Table = dict[tuple[Any, Any], dict[str, Any]]


def _others_as_base(report: dict[str, Any], row: dict[str, Any], free: Sequence[str]) -> bool:
    return all(row[n] == report["base"][n] for n in NAMES if n not in free)


def _table_3(report: dict[str, Any]) -> tuple[str, Table]:
    free = ("tau_add", "tau_act", "tau_conf")
    return "tau_act = tau_conf \\ tau_add", {
        (row["tau_conf"], row["tau_add"]): row
        for row in report["rows"]
        if row["tau_act"] == row["tau_conf"] and _others_as_base(report, row, free)
    }


def _table_4(report: dict[str, Any]) -> tuple[str, Table]:
    free = ("tau_act", "tau_conf", "tau_add")
    return "tau_conf \\ tau_act (tau_add 0.1)", {
        (row["tau_conf"], row["tau_act"]): row
        for row in report["rows"]
        if row["tau_add"] == 0.1 and _others_as_base(report, row, free)
    }


def _shapes(report: dict[str, Any]) -> tuple[str, Table]:
    return "block size \\ max_blocks", {
        (row["block_size"], row["max_blocks"]): row
        for row in report["rows"]
        if _others_as_base(report, row, ("block_size", "max_blocks"))
    }


def _grid(report: dict[str, Any], title: str, found: tuple[str, Table]) -> list[str]:
    corner, table = found
    left = sorted({key[0] for key in table})
    top = sorted({key[1] for key in table})
    if len(table) < 3:
        return []
    lines = ["", title, "", "Tokens per forward / useful tokens per second / exact %.", ""]
    lines += [f"| {corner} | " + " | ".join(map(str, top)) + " |", "|" + "---|" * (1 + len(top))]
    for side in left:
        cells = []
        for head in top:
            row = table.get((side, head))
            cells.append(
                f"{row['tokens_per_forward']:.2f} / {row['tokens_per_s']:.0f} / "
                f"{100 * row['exact']:.1f}"
                if row
                else ""
            )
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Score over speed, by forwards and by the clock, the frontier drawn through."""
    rows = report["rows"]
    figure, axes = new_figure(height=4.4, columns=2)
    labels = (
        ("tokens_per_forward", "pareto_forward", "useful tokens per forward"),
        ("tokens_per_s", "pareto_speed", f"useful tokens/s, batch size {report['batch_size']}"),
    )
    shades: Any = None
    for axis, (speed, mark, label) in zip(axes, labels, strict=True):
        shades = axis.scatter(
            [r[speed] for r in rows],
            [100 * r["exact"] for r in rows],
            c=[r["tau_conf"] for r in rows],
            s=[12 + 3 * r["block_size"] for r in rows],
            cmap="viridis",
            alpha=0.75,
            linewidths=0,
        )
        best = sorted((r[speed], 100 * r["exact"]) for r in rows if r[mark])
        axis.plot(*zip(*best, strict=True), "o-", color="crimson", mfc="none", ms=11, lw=1.2,
                  label="Pareto points")  # fmt: skip
        own = [r for r in rows if _others_as_base(report, r, ())]
        axis.plot([r[speed] for r in own], [100 * r["exact"] for r in own], "k*", ms=12,
                  label="the model's own settings")  # fmt: skip
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("answers right to the letter, %")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10,
    )
    figure.colorbar(shades, ax=axes, label="tau_conf (size of a dot: block size)")
    flat = ", frontier flat" if report["flat"] else ""
    figure.suptitle(f"{report['model']}: {report['problems']} problems{flat}", fontsize=11)
    save(figure, path)
