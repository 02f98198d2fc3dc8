# SPDX-License-Identifier: Apache-2.0
"""The speed/score frontier of the three thresholds, the block size and the window's width.

    python -m benchmarks.sweep --json benchmarks/results/sweep.json   # the paper's grid
    python -m benchmarks.sweep --grid full --json sweep.json          # every combination
    python -m benchmarks.sweep --quick                                # a few points, seconds
    python -m benchmarks.sweep --model d2f-smollm2-extract --job extract --data test.jsonl \\
        --dtype bfloat16 --max-tokens 128 --max-model-len 1024

One engine serves all points: settings travel with each request (`vllm_xargs`, d2f_*). Every point
answers the same problems, at batch size 1 like the paper unless told otherwise. All points are
measured once before any is measured again, so a slow minute of the machine hits them alike. The
journal beside --json stays: another grid adds to it.
"""

import argparse
import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.harness import figure, record
from benchmarks.harness.record import Record
from benchmarks.harness.worker import most_modes
from benchmarks.harness.workload import (
    Item,
    d2f_model,
    load_items,
    parse_options,
    refuse_simulated,
)
from benchmarks.tasks.jobs import JOBS, Job, load_job
from training.intervals import interval
from vllm_d2f.d2f import D2FParams

NAMES = ("block_size", "max_blocks", "tau_add", "tau_act", "tau_conf")
UNITS = {
    "tokens_per_forward": "useful tokens per forward a request took part in",
    "tokens_per_s": "useful tokens (up to the end token, it included) per second, median of runs",
    "tokens_per_s_range": "slowest and fastest run",
    "tokens_per_cpu_s": "the same per second of CPU time, for a machine that others share",
    "exact": "fraction of answers right to the letter",
    "final": "fraction of answers that end by themselves with the right number",
    "exact_ci95": "95 % interval (Wilson) of `exact`",
    "score": "of the job, if answers are not scored to the letter, with its 95 % interval",
    "pareto_forward": "no point is as good in tokens per forward and score, and better in one",
    "pareto_speed": "the same by tokens per second",
}
TAU_CONF = (0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
TAU_ADD = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)
TAU_ACT = (0.7, 0.85, 0.95, 0.99)
BEYOND = (0.1, 0.3, 0.5)
"""tau_conf below the paper's range: where a model that is sure of itself begins to err."""
BLOCK_SIZES = (8, 16, 32)
MAX_BLOCKS = (1, 2, 4)


def paper_grid(base: D2FParams) -> list[D2FParams]:
    """Return the points of the paper's figure 2 and tables 3 and 4, around the model's settings."""
    figure_2 = [
        replace(base, tau_add=0.1, tau_act=act, tau_conf=conf)
        for conf, act in itertools.product((*BEYOND, *TAU_CONF), TAU_ACT)
    ]
    table_3 = [
        replace(base, tau_add=add, tau_act=tau, tau_conf=tau)
        for tau, add in itertools.product((0.85, 0.9, 0.95), TAU_ADD)
    ]
    shapes = [
        replace(base, block_size=size, max_blocks=blocks)
        for size, blocks in itertools.product((4, *BLOCK_SIZES), MAX_BLOCKS)
    ]
    return _unique([base, *figure_2, *table_3, *shapes])


def full_grid(base: D2FParams) -> list[D2FParams]:
    """Return every combination of the three thresholds, block sizes and window widths."""
    axes = (BLOCK_SIZES, MAX_BLOCKS, TAU_ADD, TAU_ACT, TAU_CONF)
    return _unique([base, *(D2FParams(*point) for point in itertools.product(*axes))])


def quick_grid(base: D2FParams) -> list[D2FParams]:
    """Return the model's own settings, a cautious and a bold point, and one block at a time."""
    cautious = replace(base, tau_add=0.9, tau_act=0.99, tau_conf=0.99)
    bold = replace(base, tau_add=0.05, tau_act=0.7, tau_conf=0.1)
    return _unique([base, cautious, bold, replace(base, block_size=4, max_blocks=1)])


GRIDS = {"paper": paper_grid, "full": full_grid, "quick": quick_grid}


def _unique(points: Iterable[D2FParams]) -> list[D2FParams]:
    return list(dict.fromkeys(points))


def weights_digest(model: str) -> str | None:
    """Return a digest that tells a folder's weights from other ones; None for a Hub id."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(file.read(1 << 22) + str(path.stat().st_size).encode())
    return digest.hexdigest()[:16] if files else None


def ask(
    engine: Any, params: D2FParams, repeat: int, items: Sequence[Item], batch: int, job: Job
) -> dict[str, Any]:
    """Answer all items with the given settings.

    `wrong` has the problems that are not exact, to compare points problem by problem, and `counts`
    what is right of how much in each where the job counts more finely; `cpu_seconds` is the time of
    this process, engine included.
    """
    from benchmarks.harness.engine import greedy

    engine.sampling = greedy(engine.sampling.max_tokens, params)
    batches = engine.measure(items, batch)
    answers = [answer for one in batches for answer in one.answers]
    sums = ("exact", "final", "useful", "forwards")
    return {
        **{"params": asdict(params), "repeat": repeat, "problems": len(answers)},
        **{name: sum(getattr(answer, name) for answer in answers) for name in sums},
        "wrong": [a.item for a in answers if not a.exact],
        "counts": []
        if job.score == "exact"
        else [job.counts(items[a.item].answer or "", a.complete) for a in answers],
        "seconds": round(sum(one.seconds for one in batches), 4),
        "cpu_seconds": round(sum(one.cpu_s for one in batches), 4),
    }


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a fraction."""
    z, p = 1.96, right / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(worse: set[int], better: set[int]) -> float:
    """Return the probability that chance alone makes two points differ so much.

    Args:
        worse, better: the problems that each point got wrong.
    """
    only_worse, only_better = len(worse - better), len(better - worse)
    total, least = only_worse + only_better, min(only_worse, only_better)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(least + 1)) / 2**total)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each (speed, score) whether none is as good in both and better in one."""
    return [
        not any(s >= speed and r >= score and (s, r) != (speed, score) for s, r in points)
        for speed, score in points
    ]


def build(base: Mapping[str, Any], measurements: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report's parts: one row per point, the frontier marked, and whether it is flat."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in measurements:
        groups.setdefault(tuple(one["params"][name] for name in NAMES), []).append(one)
    rows = [_row(runs) for runs in groups.values()]
    for mark, speed in (("pareto_forward", "tokens_per_forward"), ("pareto_speed", "tokens_per_s")):
        for row, best in zip(rows, pareto([(r[speed], score_of(r)) for r in rows]), strict=True):
            row[mark] = best
    lowest, highest = (f(rows, key=score_of) for f in (min, max))
    wrong = {key: set(runs[0]["wrong"]) for key, runs in groups.items()}
    chance = sign_test(*(wrong[tuple(row[n] for n in NAMES)] for row in (lowest, highest)))
    score = {"lowest": score_of(lowest), "highest": score_of(highest), "chance": round(chance, 5)}
    return {
        "score": score,
        # A difference that chance explains is no trade of score for speed.
        "flat": chance > 0.05,
        "base": dict(base),
        "units": UNITS,
        "rows": rows,
    }


def score_of(row: Mapping[str, Any]) -> float:
    """Return the job's score of a point."""
    return float(row.get("score", row["exact"]))


def _row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, problems = runs[0], runs[0]["problems"]
    speeds, by_cpu = (
        [run["useful"] / run[name] for run in runs] for name in ("seconds", "cpu_seconds")
    )
    row = {
        **first["params"],
        "tokens_per_forward": round(first["useful"] / first["forwards"], 3),
        "tokens_per_s": round(statistics.median(speeds), 1),
        "tokens_per_s_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "tokens_per_cpu_s": round(statistics.median(by_cpu), 1),
        "runs": len(runs),
        "exact": round(first["exact"] / problems, 4),
        "exact_ci95": [round(x, 4) for x in wilson(first["exact"], problems)],
        "final": round(first["final"] / problems, 4),
    }
    if counts := first.get("counts"):
        score, *ends = interval(counts)
        row |= {"score": round(score, 4), "score_ci95": [round(end, 4) for end in ends]}
    return row


def verdict(report: Mapping[str, Any]) -> str:
    """Describe the frontier in one sentence."""
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


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return the report as tables; points on a frontier first."""
    base, name = report["base"], report.get("score_name", "exact")
    scored = " score score_ci95" if name != "exact" else ""

    def others_as_base(row: Mapping[str, Any], *free: str) -> bool:
        return all(row[name] == base[name] for name in NAMES if name not in free)

    def cell(row: Mapping[str, Any] | None) -> str:
        form = "{tokens_per_forward:.2f} / {tokens_per_s:.0f} / {percent:.1f}"
        return form.format(**row, percent=100 * score_of(row)) if row else ""

    def grid(title: str, corner: str, keys: tuple[str, str], rows: list[Any]) -> list[str]:
        found = {tuple(row[key] for key in keys): row for row in rows}
        if len(found) < 3:
            return []
        left, top = (sorted({key[i] for key in found}) for i in (0, 1))
        cells = ((side, *(cell(found.get((side, head))) for head in top)) for side in left)
        what = f"Tokens per forward / useful tokens per second / {name} %."
        return [f"## {title}", "", what, "", *record.table((corner, *map(str, top)), cells)]

    taus = ("tau_add", "tau_act", "tau_conf")
    around = [row for row in report["rows"] if others_as_base(row, *taus)]
    tied = [row for row in around if row["tau_act"] == row["tau_conf"]]
    at_01 = [row for row in around if row["tau_add"] == 0.1]
    shaped = [row for row in report["rows"] if others_as_base(row, "block_size", "max_blocks")]
    return [
        *record.head("Speed against score", report),
        f"{report['model']}, {report['problems']} problems ({report['data']}),",
        f"batch size {report['batch_size']}, at most {report['max_tokens']} tokens, greedy.",
        "",
        verdict(report),
        "",
        "Own settings of the model: " + ", ".join(f"{name} {base[name]}" for name in NAMES) + ".",
        "",
        *grid("tau_act = tau_conf against tau_add (paper: table 3)",
              "tau_act = tau_conf \\ tau_add", ("tau_conf", "tau_add"), tied),
        *grid("tau_conf against tau_act (paper: table 4, figure 2)",
              "tau_conf \\ tau_act (tau_add 0.1)", ("tau_conf", "tau_act"), at_01),
        *grid("Block size against max_blocks",
              "block size \\ max_blocks", ("block_size", "max_blocks"), shaped),
        "## All points",
        "",
        "F: on the frontier by tokens per forward, S: by useful tokens per second.",
        "",
        *record.columns(
            f"frontier {' '.join(NAMES)} tokens_per_forward tokens_per_s tokens_per_s_range "
            f"tokens_per_cpu_s{scored} exact exact_ci95{' final' * (not scored)}",
            (
                row | {"frontier": "F" * row["pareto_forward"] + "S" * row["pareto_speed"]}
                for row in sorted(report["rows"], key=lambda row: -row["tokens_per_forward"])
            ),
        ),
    ]  # fmt: skip


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw score over speed, by forwards and by the clock, with the frontier as a line."""
    rows = report["rows"]
    drawing, axes = figure.new_figure(height=4.4, columns=2)
    labels = (
        ("tokens_per_forward", "pareto_forward", "useful tokens per forward"),
        ("tokens_per_s", "pareto_speed", f"useful tokens/s, batch size {report['batch_size']}"),
    )
    own = [r for r in rows if all(r[name] == report["base"][name] for name in NAMES)]
    dots = {"c": [r["tau_conf"] for r in rows], "s": [12 + 3 * r["block_size"] for r in rows]}
    shades: Any = None
    for axis, (speed, mark, label) in zip(axes, labels, strict=True):

        def place(some: list[Any], speed: str = speed) -> list[tuple[float, ...]]:
            return list(zip(*sorted((r[speed], 100 * score_of(r)) for r in some), strict=True))

        where = [r[speed] for r in rows], [100 * score_of(r) for r in rows]
        shades = axis.scatter(*where, **dots, cmap="viridis", alpha=0.75, linewidths=0)
        style = dict(color="crimson", mfc="none", ms=11, lw=1.2, label="Pareto points")
        axis.plot(*place([r for r in rows if r[mark]]), "o-", **style)
        axis.plot(*(place(own) or ([], [])), "k*", ms=12, label="the model's own settings")
        axis.set_xlabel(label)
    name = report.get("score_name", "exact")
    axes[0].set_ylabel("answers right to the letter, %" if name == "exact" else f"{name}, %")
    style = dict(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    drawing.legend(*axes[0].get_legend_handles_labels(), **style)
    drawing.colorbar(shades, ax=axes, label="tau_conf (size of a dot: block size)")
    flat = ", frontier flat" if report["flat"] else ""
    drawing.suptitle(f"{report['model']}: {report['problems']} problems{flat}", fontsize=11)
    figure.save(drawing, path)


FIGURES = {"": draw}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("sweep", __doc__)
    add = parser.add_argument
    add("--model", default="d2f-tiny", help="embedded name, folder or Hub id")
    add("--grid", choices=list(GRIDS), default="paper")
    add("--problems", type=int, default=200)
    add(
        "--data",
        help='JSONL with "question" and "answer" per line; of a job "prompt" and "response"',
    )
    add("--job", choices=["exact", "extract"], default="exact", help="how answers are scored")
    add("--dtype", default="float32")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for the engine")
    add("--max-tokens", type=int, default=64)
    add("--max-model-len", type=int, default=512)
    add("--batch-size", type=int, default=1)
    add("--repeats", type=int, default=3)
    quick = {"grid": "quick", "problems": 10, "repeats": 1}
    return parser.finish(argv, quick, ("problems", "max_tokens", "batch_size", "repeats"))


def _items(args: argparse.Namespace, model: str) -> list[Item]:
    if args.job == "exact":
        return load_items(args.problems, args.data, args.seed)
    from transformers import AutoTokenizer

    return load_job(args.data, args.problems, args.seed, AutoTokenizer.from_pretrained(model))


def sweep(run: Record) -> None:
    """Measure what is not measured yet, and report on everything."""
    from tqdm import tqdm

    args = run.args
    model, config, defaults = d2f_model("--model", args.model)
    job, items = JOBS[args.job], _items(args, model)
    refuse_simulated(f"--model {args.model}", config, "a speed/score frontier")
    base = defaults.params
    points = GRIDS[args.grid](base)
    about = {
        "model": args.model if not Path(args.model).exists() else Path(args.model).name,
        "weights": weights_digest(model),
        "data": Path(args.data).name if args.data else "training.arithmetic test",
        **{name: getattr(args, name) for name in ("problems", "max_tokens", "batch_size", "seed")},
    }
    if args.job != "exact":
        about |= {"job": args.job, "score_name": job.score, "dtype": args.dtype}
    run.keep_journal = True
    run.identify(**about)

    @cache
    def engine() -> Any:
        from benchmarks.harness.engine import Engine

        section = {"d2f": {"window": max(p.window for p in points)}}
        options = {"max_model_len": args.max_model_len, "additional_config": section}
        options |= {"dtype": args.dtype, **parse_options("--engine-args", args.engine_args)}
        most = {"max_batch": args.batch_size, "max_tokens": args.max_tokens}
        one = Engine(model, mode=most_modes()[0], **most, options=options)
        ask(one, base, 0, items[:8], args.batch_size, job)  # warm-up
        return one

    def measure(params: D2FParams, repeat: int) -> dict[str, Any]:
        return ask(engine(), params, repeat, items, args.batch_size, job)

    every = list(itertools.product(range(args.repeats), points))
    for repeat, params in tqdm(every, desc="sweep", disable=None):
        key = " ".join(map(str, (*asdict(params).values(), repeat)))
        run.point(key, partial(measure, params, repeat))
    run.need_all()
    wanted = [asdict(params) for params in points]
    kept = [found for found in run.points.values() if found["params"] in wanted]
    run.write(run.report(**about, **build(asdict(base), kept)))


main = record.command(parse, sweep, markdown, FIGURES)

if __name__ == "__main__":
    sys.exit(main())
