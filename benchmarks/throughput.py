# SPDX-License-Identifier: Apache-2.0
"""Useful tokens per second, with the score beside it: D2F, autoregressive, vanilla diffusion.

    python -m benchmarks.throughput                       # the embedded models, about 15 minutes
    python -m benchmarks.throughput --quick               # under a minute
    python -m benchmarks.throughput --d2f FOLDER --ar FOLDER --teacher "" --data gsm8k_test.jsonl

All decoders stay loaded, each in its own process, and answer the same prompts in turn: in every run
each of them does every batch size once, so that a ratio compares what was measured moments apart. A
batch is one `LLM.generate` call. The prefix cache is off, the prompts' time is included.

Vanilla diffusion is the teacher in plain transformers (`harness/vanilla.py`), one prompt at a time;
`512:4` means a canvas of 512 positions and four tokens per step. In each run it gets as many
prompts as fit `--vanilla-forwards`, others in the next run.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import figure, record
from benchmarks.harness.engine import Batch, Done, answers, paired, rate, total
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.timing import percentiles, rounded, spread
from benchmarks.harness.worker import Decoder, Worker, most_modes, prepare_process, workers
from benchmarks.harness.workload import Item, load_items, parse_options, resolve_model

if TYPE_CHECKING:
    from benchmarks.harness.vanilla import Setting

QUICK: dict[str, Any] = dict(
    batch_sizes=[1, 4], runs=2, prompts=4, modes=["eager"], vanilla=["64:1", "64:4"]
)
NOTE = {
    "d2f": "vLLM with vllm-d2f, V2 model runner",
    "ar": "stock vLLM, its default model runner",
    "vanilla": "plain transformers, full recomputation, batch size 1; LENGTH:TOKENS_PER_STEP",
}
UNITS = {
    "useful_tokens_per_s": "tokens up to and including the end token, per second of wall time",
    "useful_tokens_per_cpu_s": "the same per second of CPU time of the decoder's process",
    "raw_tokens_per_s": "all decoded tokens, those behind the end token too, per second",
    "tokens_per_forward": "useful tokens per forward the request took part in",
    "computed_per_committed": "positions run through the model after the prompt, per useful token",
    "time_to_first_token_ms": "from handing in the batch to the request's first tokens",
    "time_per_token_ms": "from handing in the batch to the request's last token, per useful token",
    "step_ms": "wall time per engine step (forward), everything included",
    "peak_mib": "peak resident memory of the decoder's process (on a GPU: of the device)",
    "score": "share of answers that end by themselves with the right number",
    "simulated_tokens_per_forward": "accepted whatever the model said; null: the models decided",
    "exact": "share of answers that are the expected text to the letter, null without such a text",
    "ratio": "paired: of two measurements in the same run; median, lowest and highest run",
}


@dataclass(frozen=True)
class Key:
    """What was measured: `kind` is d2f, ar or vanilla; `mode` eager, compiled or `512:1`."""

    kind: str
    mode: str
    batch_size: int


Runs = dict[Key, list[list[Batch]]]


@dataclass(frozen=True)
class Plan:
    """One measurement: everything that is asked, and how often."""

    items: tuple[Item, ...]
    batch_sizes: tuple[int, ...]
    runs: int
    prompts: int
    vanilla: tuple["Setting", ...]
    vanilla_forwards: int

    def asked(self, batch_size: int) -> tuple[Item, ...]:
        """Return at least `prompts` problems, in whole batches."""
        return self.items[: needed([batch_size], self.prompts)]

    def asked_vanilla(self, setting: "Setting", run: int) -> tuple[int, tuple[Item, ...]]:
        """Return the first prompt's number and the prompts of a run."""
        count = max(1, min(self.prompts, self.vanilla_forwards // setting.steps))
        start = run * count % (self.prompts - self.prompts % count)
        return start, self.items[start : start + count]


def needed(batch_sizes: Sequence[int], prompts: int) -> int:
    """Return the most problems that a plan asks."""
    return max(-(-prompts // size) * size for size in batch_sizes)


def warm_up(plan: Plan, decoders: Mapping[str, Worker]) -> None:
    """Let every decoder run once, the teacher in its fastest setting."""
    for name, worker in decoders.items():
        if name == "vanilla":
            worker.measure(plan.items[:1], plan.vanilla[-1])
        else:
            worker.warm_up(plan.items, plan.batch_sizes)


def measure(plan: Plan, decoders: Mapping[str, Worker], run: int, size: int) -> dict[str, Any]:
    """Measure a batch size in one run: every decoder once, by "kind mode", in alternating order."""
    found = {}
    engines = [(name, worker) for name, worker in decoders.items() if name != "vanilla"]
    for name, worker in engines if run % 2 == 0 else reversed(engines):
        found[name] = worker.measure(plan.asked(size), size)
    # The runs of batch size 1 are what the teacher is paired with.
    if "vanilla" in decoders and size == min(plan.batch_sizes):
        for setting in plan.vanilla:
            start, items = plan.asked_vanilla(setting, run)
            found[f"vanilla {setting}"] = decoders["vanilla"].measure(items, setting, start)
    return found


def runs_of(plan: Plan, points: Mapping[str, Any]) -> Runs:
    """Return the complete runs of a record."""
    runs: Runs = {}
    for run in range(plan.runs):
        keys = [(size, f"run {run}, batch {size}") for size in plan.batch_sizes]
        if any(key not in points for _, key in keys):
            break
        for size, key in keys:
            for name, batches in points[key].items():
                kind, mode = name.split()
                one = Key(kind, mode, 1 if kind == "vanilla" else size)
                runs.setdefault(one, []).append([Batch.from_dict(b) for b in batches])
    return runs


# From measured batches to figures.


def point(runs: Done, has_text: bool) -> dict[str, Any]:
    """Return the figures of a decoder at one batch size. `has_text`: whole answers are expected."""
    every = answers(runs)
    useful = sum(a.useful for a in every)
    return {
        "runs": len(runs),
        "answers_per_run": len(answers(runs[:1])),
        "useful_tokens_per_s": spread(rate(run) for run in runs),
        "useful_tokens_per_cpu_s": spread(rate(run, per="cpu_s") for run in runs),
        "raw_tokens_per_s": spread(rate(run, "raw") for run in runs),
        "requests_per_s": spread(1 / _seconds_per_answer(run) for run in runs),
        "tokens_per_forward": rounded(useful / sum(a.forwards for a in every)),
        "computed_per_committed": rounded(sum(a.computed for a in every) / useful),
        "time_to_first_token_ms": percentiles(1e3 * a.first_s for a in every),
        "time_per_token_ms": percentiles(1e3 * a.last_s / a.useful for a in every),
        "step_ms": spread(1e3 * total(run, "seconds") / total(run, "steps") for run in runs),
        "peak_mib": round(max(batch.peak_mib for run in runs for batch in run)),
        "score": rounded(sum(a.final for a in every) / len(every)),
        "exact": rounded(sum(a.exact for a in every) / len(every)) if has_text else None,
        "problems": len({a.item for a in every}),
    }


def paired_per_answer(mine: Done, other: Done) -> dict[str, dict[str, float]]:
    """Compare with a decoder that answered some of the problems one by one, on those problems.

    `answers` compares seconds per answer, `tokens` useful tokens per second. They differ where one
    of the two ends its answers early, that is, wrong.
    """
    per_answer, per_token = [], []
    for run, theirs in zip(mine, other, strict=True):
        asked = {a.item for a in answers([theirs])}
        same = [batch for batch in run if {a.item for a in batch.answers} <= asked]
        per_answer.append(_seconds_per_answer(theirs) / _seconds_per_answer(same))
        per_token.append(rate(same) / rate(theirs))
    return {"answers": spread(per_answer), "tokens": spread(per_token)}


def _seconds_per_answer(run: Sequence[Batch]) -> float:
    return total(run, "seconds") / len(answers([run]))


def build(
    runs: Runs,
    names: Mapping[str, str],
    max_tokens: int,
    has_text: bool,
    simulated: float | None = None,
) -> dict[str, Any]:
    """Return the report's parts, the most important figures first.

    `simulated`: simulated tokens per forward; None where the models decided.
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
    scores = {p["mode"]: p["score"] for p in points if p["kind"] == "vanilla"}
    d2f = best(runs, "d2f", 1)
    return {
        "benchmark": "throughput",
        "speedup_vs_ar_batch1": next(
            (row["ratio"]["median"] for row in against_ar if row["batch_size"] == 1), None),
        **{f"score_{kind}": p["score"] for kind, p in largest.items()},
        **{f"exact_{kind}": p["exact"] for kind, p in largest.items()},
        "score_problems": {kind: p["problems"] for kind, p in largest.items()},
        "score_vanilla": scores, "simulated_tokens_per_forward": simulated,
        "models": {kind: f"{name} ({NOTE[kind]})" for kind, name in names.items()},
        "max_tokens": max_tokens, "units": UNITS, "d2f_vs_ar": against_ar,
        "d2f_vs_vanilla": [
            {"setting": key.mode, "score_vanilla": scores[key.mode],
             "ratio": paired_per_answer(runs[d2f], done)}
            for key, done in runs.items()
            if key.kind == "vanilla" and d2f
        ],
        "points": points,
    }  # fmt: skip


def best(runs: Runs, kind: str, batch_size: int) -> Key | None:
    """Return the mode (eager or compiled) in which a decoder was faster at this batch size."""
    keys = [key for key in runs if key.kind == kind and key.batch_size == batch_size]
    return max(keys, key=lambda key: spread(map(rate, runs[key]))["median"], default=None)


def _against_ar(runs: Runs) -> list[dict[str, Any]]:
    """Compare each decoder in its own best mode, at every batch size."""
    rows = []
    for size in sorted({key.batch_size for key in runs if key.kind == "ar"}):
        d2f, ar = best(runs, "d2f", size), best(runs, "ar", size)
        if not (d2f and ar):
            continue
        same_mode = {
            key.mode: paired(done, runs[replace(key, kind="ar")])
            for key, done in runs.items()
            if (key.kind, key.batch_size) == ("d2f", size) and replace(key, kind="ar") in runs
        }
        modes, ratio = {"d2f": d2f.mode, "ar": ar.mode}, paired(runs[d2f], runs[ar])
        rows.append({"batch_size": size, "modes": modes, "ratio": ratio, "same_mode": same_mode})
    return rows


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return the tables of `benchmarks/results/throughput.md`."""
    figures = "useful_tokens_per_s requests_per_s.median tokens_per_forward computed_per_committed"
    times = "time_to_first_token_ms time_per_token_ms peak_mib score problems exact"
    return [
        *record.head("Throughput", report),
        *[f"- {kind}: {text}" for kind, text in report["models"].items()],
        "",
        "Useful tokens are those up to and including the end token. Ranges are over the runs.",
        "D2F / AR: each in its faster mode, D2F / AR. Times are p50 / p99.",
        "",
        *record.columns("batch_size ratio modes", report["d2f_vs_ar"], ratio="D2F / AR"),
        *record.columns(
            "setting score_vanilla ratio.answers ratio.tokens", report["d2f_vs_vanilla"],
            **{"ratio.answers": "time per answer, vanilla / D2F",
               "ratio.tokens": "useful tokens/s, D2F / vanilla"},
        ),
        *record.columns(f"kind mode batch_size {figures} {times}", report["points"]),
    ]  # fmt: skip


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw useful tokens per second against batch size, lowest to highest run shaded."""
    drawing, axes = figure.new_figure(height=5.2)
    points = report["points"]
    styles = {"eager": "-", "compiled": "--"}
    series = {(p["kind"], p["mode"]) for p in points if p["kind"] != "vanilla"}
    for kind, mode in sorted(series, reverse=True):
        rows = [p for p in points if (p["kind"], p["mode"]) == (kind, mode)]
        sizes = [p["batch_size"] for p in rows]
        speed = {k: [p["useful_tokens_per_s"][k] for p in rows] for k in ("median", "min", "max")}
        label = f"{figure.NAMES[kind]}, {mode}, {report[f'score_{kind}']:.1%} right"
        style, color = styles.get(mode, ":"), figure.COLORS[kind]
        axes.plot(sizes, speed["median"], style, marker="o", color=color, label=label)
        axes.fill_between(sizes, speed["min"], speed["max"], color=color, alpha=0.15, lw=0)
    markers, color = iter("sD^vPX*"), figure.COLORS["vanilla"]
    for p in (p for p in points if p["kind"] == "vanilla"):
        # Hollow marks: most answers are wrong, so the speed is of no use.
        how = dict(color=color, mfc=color if p["score"] >= 0.5 else "none", ls="none")
        where, label = p["useful_tokens_per_s"]["median"], f"{p['mode']}, {p['score']:.0%} right"
        axes.plot(p["batch_size"], where, next(markers, "."), label=f"vanilla {label}", **how)
    figure.logarithmic(axes, "batch size", "useful tokens per second")
    axes.set_xticks(sorted({p["batch_size"] for p in points}))
    figure.legend_below(axes)
    figure.label_simulated(axes, report)
    figure.save(drawing, path)


FIGURES = {"": draw}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("throughput", __doc__)
    add = parser.add_argument
    add("--d2f", default="d2f-tiny", help="D2F model: embedded name, folder or Hub id")
    add("--ar", default="ar-tiny", help='autoregressive model, "" for none')
    add("--teacher", default="dream-tiny", help='teacher for vanilla diffusion, "" for none')
    add("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    add("--runs", type=int, default=5)
    add("--prompts", type=int, default=32, help="prompts per run and batch size, at least")
    add("--max-tokens", type=int, default=64)
    add("--data", help='JSONL with "question" and "answer" (default: generated problems)')
    help = "of vLLM (default: both, on a GPU compiled, as each is an engine of its own)"
    add("--modes", nargs="+", choices=("eager", "compiled"), help=help)
    add("--vanilla", nargs="+", default=["512:1", "512:4", "64:1", "64:4"], metavar="LEN:PER_STEP")
    add("--vanilla-forwards", type=int, default=512, help="forwards of the teacher per run")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for both vLLM engines")
    args = parser.finish(argv, QUICK, ("batch_sizes", "runs", "prompts", "max_tokens"))
    if args.teacher and min(args.batch_sizes) != 1:
        parser.error('the teacher is compared at batch size 1: add 1, or pass --teacher ""')
    return args


def throughput(run: Record) -> None:
    """Measure every batch size in every run and report."""
    from benchmarks.harness.vanilla import parse_settings

    args = run.args
    named = {"d2f": ("--d2f", args.d2f), "ar": ("--ar", args.ar)}
    named["vanilla"] = ("--teacher", args.teacher)
    vanilla = parse_settings("--vanilla", args.vanilla)
    items = load_items(needed(args.batch_sizes, args.prompts), args.data, args.seed)
    sizes = tuple(sorted(set(args.batch_sizes)))
    plan = Plan(tuple(items), sizes, args.runs, args.prompts, vanilla, args.vanilla_forwards)
    options = parse_options("--engine-args", args.engine_args)
    models = {kind: resolve_model(*given) for kind, given in named.items() if given[1]}
    if "d2f" not in models:
        raise UsageError("no model to measure: pass --d2f an embedded name or a folder")
    table = [Decoder("vanilla", models["vanilla"], "vanilla")] if "vanilla" in models else []
    for mode in args.modes or most_modes():
        for kind in ("d2f", "ar"):
            if kind in models:
                table.append(Decoder(f"{kind} {mode}", models[kind], mode, options))
    try:
        _measure_all(run, plan, table)
    except KeyboardInterrupt:
        if not runs_of(plan, run.points):
            raise
        print("stopped; reporting the complete runs", file=sys.stderr)
        run.keep_journal = True
    run.need_all()
    names = {kind: Path(name).name for kind, (_, name) in named.items() if name}
    has_text = all(item.answer is not None for item in plan.items)
    made_up = run.points["simulated"]
    parts = build(runs_of(plan, run.points), names, args.max_tokens, has_text, made_up)
    run.write(run.report(**parts))


def _measure_all(run: Record, plan: Plan, table: Sequence[Decoder]) -> None:
    from tqdm import tqdm

    every = itertools.product(range(plan.runs), plan.batch_sizes)
    keys = {f"run {number}, batch {size}": (number, size) for number, size in every}
    if all(run.settled(key) for key in keys):
        return
    with workers(table, max(plan.batch_sizes), run.args.max_tokens) as decoders:
        made_up = [w.simulated for w in decoders.values() if w.simulated is not None]
        run.point("simulated", lambda: made_up[0] if made_up else None)
        warm_up(plan, decoders)
        for key, (number, size) in tqdm(keys.items(), desc="measured", disable=None):
            run.point(key, partial(measure, plan, decoders, number, size))


main = record.command(parse, throughput, markdown, FIGURES, prepare_process)

if __name__ == "__main__":
    sys.exit(main())
