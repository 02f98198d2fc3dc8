# SPDX-License-Identifier: Apache-2.0
"""Predict D2F against autoregressive decoding for 7B on an H200 and an H100 and 70B on 8 H100s.

    python -m benchmarks.projection
    python -m benchmarks.projection --model d2f-smollm2-extract --job extract --data test.jsonl \\
        --dtype bfloat16 --settings '{"tau_add": 0.1}'

Two things are measured: the steps of a 7B shape on an H200 (`--steps`, `--piecewise`), and a
decoding profile, which this command measures on a small model: tokens per forward and window
positions for 1, 2, ... open blocks. Everything else is an assumption with a range, and the tables
say so. Every cell is the middle of the assumptions, with the lowest and the highest that they
allow. Adaptation is the best number of leading blocks at each batch size.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.harness import cost, figure, record, shapes
from benchmarks.harness.cost import Projected, Trace
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.timing import rounded
from benchmarks.harness.worker import most_modes
from benchmarks.harness.workload import d2f_model, parse_options, refuse_simulated
from benchmarks.tasks.jobs import JOBS, load_job
from training.intervals import interval

D2F, AR = "dream", "qwen"
"""The shapes whose steps were measured."""

GPUS = {"H200": (4800.0, 989e3), "H100": (3350.0, 989e3)}
"""GB/s and dense bfloat16 GFLOP/s in NVIDIA's data sheets (SXM)."""

TARGETS = {
    "7B, H200": (AR, "H200", 1),
    "7B, H100": (AR, "H100", 1),
    "70B, 8 H100": ("llama70b", "H100", 8),
}
"""Shape, GPU and how many of them. The first is where steps were measured."""

REDUCE = ((25.0, 250.0), (15.0, 370.0), (8.0, 480.0))
"""Microseconds of an all-reduce beside its bytes, and GB/s on the bus: low, middle, high. 370 (a
ring) and 480 (in the switch) are what NCCL's maintainers name for eight H100s in
github.com/NVIDIA/nccl-tests/issues/212; the rest is assumed."""

ENGINES = ("PIECEWISE graphs", "FULL graphs, the default", "nothing")
"""The time of a D2F step beyond bytes and operations: low, middle, high."""

DREAM_BLOCK = 32

PUBLISHED = {
    "EAGLE-3": {1: 2.36, 64: 1.38},
    "EAGLE-4": {1: 2.83, 8: 1.72, 64: 1.14},
    "I-DLM-8B": {1: 2.30, 4: 2.35, 16: 1.93, 64: 1.34},
}
"""Tokens per second over plain decoding, by requests at once; PAGE says on what."""


PLAIN_8B = {1: (158.3, 326 / 2.30), 4: (4 * 305 / 2.35,), 16: (16 * 237 / 1.93,),
            64: (64 * 125 / 1.34,)}  # fmt: skip
"""Published tokens per second of plain 8B decoding on one H100: the controls of EAGLE-3 and of
I-DLM, the latter from its speeds per request and ratios."""

PAGE = """\
- EAGLE-3: Llama-3.1-8B on one H100 in SGLang; 1 at once from docs.sglang.io (speculative
  decoding), 64 from the abstract of arXiv 2503.01840.
- EAGLE-4: Qwen3.8-27B on 4 B300 in vLLM; README of eagle-harness 0.1.3.
- I-DLM-8B: Qwen3-8B converted, one H100 in SGLang, MATH-500; README of its inference code.

## Measured

- Steps of the 7B shape with dummy weights: {measured_on}. Copies ran at {copy:.0f} GB/s,
  products at {product:.0f} TFLOP/s. Autoregressive steps, which read weights, reached
  {of_copy:.0%} of the first; the largest D2F step, which multiplies, {of_product:.0%} of the
  second.
- The decoding profile: {model}, job `{job}`, {prompts} prompts, blocks of {block_size}, beside
  its own settings `{settings}`. A score is {score}. `positions per token` is what arithmetic
  pays for a token; an autoregressive model pays 1.

{profile}
## Assumed

- A step takes its bytes or its operations, whichever lasts longer, at what the H200's steps
  reached. An H100 reaches the same share of its data sheet ({h100[0]:.0f} GB/s against
  {h200[0]:.0f}, both {tflops:.0f} TFLOP/s), and so does each of 8.
- What a D2F step takes beyond that stays as it was on the H200's host, and grows with the layers.
  Low: with {engines[0]}; middle: with {engines[1]}; high:
  {engines[2]}, as if it were mended.
- The widest window takes {rates[0]:g}, {rates[1]:g} or {rates[2]:g} tokens per forward, and
  narrower ones less, as in the profile. On GSM8K others measured 2.88 for D2F-LLaDA and 3.1 for
  D2F-Dream; no D2F model of 70B exists. Blocks of {dream} have the profile of those of
  {block_size} in {times:g} times the positions. Scores are not part of the prediction.
- Adaptation takes the best number of leading blocks for each batch size, alike for all requests.
- Two all-reduces a layer on 8 GPUs, low, middle and high: {reduce}.
  The two higher speeds are from github.com/NVIDIA/nccl-tests/issues/212, the rest is a guess.

## Checked

Batches on the H200 at simulated acceptance with FULL graphs, from the first prompt to the last
token: D2F / AR, the error of the ratio, and those of both speeds. So this checks the middle
engine.

{check}
Plain decoding of an 8B model on one H100, tokens per second, beside the published controls of
EAGLE-3 and I-DLM (SGLang; their prompts and answers have other lengths):

{plain_8b}"""

UNITS = {
    "profile": "measured on a small model: tokens per forward, window positions, by open blocks",
    "min, median, max": "D2F / AR tokens per second at steady load; median is the middle case",
    "blocks": "open blocks that adaptation chooses in the middle case",
    "beyond_ms": "by tokens, what measured steps take beyond their bytes and operations",
    "check": "batches of `benchmarks.steps` on the H200: predicted and measured, D2F / AR",
    "plain_8b": "tokens per second of plain 8B decoding on an H100: predicted, published",
}
QUICK: dict[str, Any] = dict(prompts=8)


def scaled(profile: Sequence[Trace], widest: float, times: float, like: Trace) -> list[Trace]:
    """Return the profile of another model, for windows of 1, 2, ... blocks.

    Every forward decodes a token; what it decodes beyond one grows in the same proportion for all
    windows, so that the widest takes `widest` tokens per forward.

    Args:
        times: blocks larger by so much hold so many times the window positions.
        like: the answer and the prompt.
    """
    more = (widest - 1) / (profile[-1].tokens_per_forward - 1)
    return [
        replace(
            like,
            tokens_per_forward=1 + more * (one.tokens_per_forward - 1),
            window_tokens=times * one.window_tokens,
        )
        for one in profile
    ]


def engines(
    report: Mapping[str, Any], piecewise: Mapping[str, Any]
) -> tuple[dict[str, float], Any]:
    """Return the bandwidth and arithmetic that steps reached, and the rest of each engine."""
    points, machine = report["points"], report["floor"]
    ar, d2f = cost.steps_of(points, AR), cost.steps_of(points, D2F)
    pieces = cost.steps_of(piecewise["points"], D2F)
    if not (ar and d2f and pieces):
        raise UsageError(
            f"--steps and --piecewise need steps of {D2F}, --steps those of {AR} as well"
        )
    reached = cost.reached(ar, d2f, D2F, machine)
    beside = [cost.beyond(points, D2F, reached) for points in (pieces, d2f)]
    return reached, (*beside, ((0.0, 0.0),))


def on(target: str, reached: Mapping[str, float]) -> Projected:
    """Return autoregressive steps on a target that reaches the same share of its data sheet."""
    shape, gpu, gpus = TARGETS[target]
    to, by = GPUS[gpu], GPUS[TARGETS[next(iter(TARGETS))][1]]
    names = ("copy_gb_per_s", "matmul_gflop_per_s")
    there = {name: reached[name] * a / b for name, a, b in zip(names, to, by, strict=True)}
    return Projected(shape, there, gpus=gpus)


def pairs(target: str, reached: Mapping[str, float], beside: Sequence[Any]) -> list[Any]:
    """Return autoregressive and D2F steps for each engine and all-reduce, from low to high.

    What a step takes beside bytes and operations stays with the host, once per layer.
    """
    plain = on(target, reached)
    times = shapes.sizes(plain.shape).layers / shapes.sizes(D2F).layers
    found = []
    for more, (us, gb_per_s) in itertools.product(beside, REDUCE):
        ar = replace(plain, reduce_us=us, reduce_gb_per_s=gb_per_s)
        longer = tuple((tokens, times * ms) for tokens, ms in more)
        found.append((ar, replace(ar, beyond=longer)))
    return found


def cell(
    steps: Sequence[Any], profiles: Sequence[Sequence[Trace]], plain: Trace, size: int
) -> dict[str, Any]:
    """Return the ratios to AR of the widest and of the best window, over all steps and profiles."""
    ratios = []
    for (ar, d2f), profile in itertools.product(steps, profiles):
        alone = cost.predict_steady(ar, plain, size)
        ratios.append([cost.predict_steady(d2f, trace, size) / alone for trace in profile])
    middle = ratios[len(ratios) // 2]
    return {
        "fixed": _range([one[-1] for one in ratios]),
        "adaptive": _range([max(one) for one in ratios]),
        "blocks": 1 + middle.index(max(middle)),
    }


def _range(values: Sequence[float]) -> dict[str, float]:
    """Return the range of the values of all cases, and the value of the middle case."""
    found = {"min": min(values), "median": values[len(values) // 2], "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def check(points: Mapping[str, Any], ar: Projected, d2f: Projected) -> list[dict[str, Any]]:
    """Return measured batches of both shapes beside the model's prediction."""
    rates = {key.split("/")[2] for key in points if key.startswith(f"{D2F}/speed/")}
    rows = []
    for rate in sorted(map(float, rates)):
        mine, plain = cost.speeds_of(points, D2F, rate), cost.speeds_of(points, AR, 1.0)
        for size in sorted(mine.keys() & plain.keys()):
            said, measured = [], []
            for steps, point in ((d2f, mine[size]), (ar, plain[size])):
                trace, budget = cost.simulated_trace(point), point["token_budget"]
                said.append(cost.predict_batch(steps, [trace], size, budget))
                measured.append(point["tokens_per_s"])
            ratios = said[0] / said[1], measured[0] / measured[1]
            rows.append({
                "batch_size": size, "tokens_per_forward": rate,
                "predicted": rounded(ratios[0]), "measured": rounded(ratios[1]),
                "error": rounded(ratios[0] / ratios[1] - 1),
                "error_d2f": rounded(said[0] / measured[0] - 1),
                "error_ar": rounded(said[1] / measured[1] - 1),
            })  # fmt: skip
    return rows


def build(
    steps: Mapping[str, Any],
    reached: dict[str, float],
    beside: Sequence[Any],
    profile: Sequence[Trace],
    block: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return the report's parts."""
    plain = Trace(1.0, 1.0, args.answer, args.prompt)
    blocks = {"dream": DREAM_BLOCK / block, "small": 1.0}
    tables: dict[str, list[dict[str, Any]]] = {}
    for target in TARGETS:
        both = pairs(target, reached, beside)
        rows = tables[target] = []
        for size in args.batch_sizes:
            row: dict[str, Any] = {"batch_size": size}
            for name, times in blocks.items():
                every = [scaled(profile, t, times, plain) for t in args.tokens_per_forward]
                row |= {
                    f"{name}_{key}": value for key, value in cell(both, every, plain, size).items()
                }
            rows.append(row)
    own, (_, middle, _) = on(next(iter(TARGETS)), reached), beside
    h100 = replace(on("7B, H100", reached), shape="llama")
    return {
        "benchmark": "projection", "units": UNITS, "reached": reached,
        "ceilings": steps["floor"], "measured_on": record.machine(steps),
        "beyond_ms": dict(zip(ENGINES, beside, strict=True)),
        "block_size": block, "answer": args.answer, "prompt": args.prompt,
        "tokens_per_forward": args.tokens_per_forward, "tables": tables,
        "check": check(steps["points"], own, replace(own, shape=D2F, beyond=middle)),
        "plain_8b": [
            {"batch_size": size, "published": [round(value, 1) for value in values],
             "predicted": rounded(cost.predict_steady(h100, plain, size))}
            for size, values in PLAIN_8B.items()
        ],
    }  # fmt: skip


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Say what follows from the tables, in sentences."""
    small, profile = report["block_size"], report["profile"]
    names = {
        "dream_fixed": f"{profile[-1]['blocks']} blocks of {DREAM_BLOCK}",
        "dream_adaptive": f"adaptive, blocks of {DREAM_BLOCK}",
        "small_adaptive": f"adaptive, blocks of {small}",
    }
    lines = []
    for target, rows in report["tables"].items():
        ahead = []
        for key, name in names.items():
            most = [up_to(rows, key, end) for end in ("median", "min", "max")]
            ahead.append("{}: {} ({} to {})".format(name, *most))
        end = rows[-1]
        gain = end["dream_adaptive"]["median"] / end["dream_fixed"]["median"]
        lines.append(
            f"- {target}: the most requests at once up to which D2F is not slower than AR are, "
            f"{'; '.join(ahead)}. At {end['batch_size']} adaptation makes blocks of {DREAM_BLOCK} "
            f"{gain:.2g} times as fast, and blocks of {small} with it reach "
            f"{record.show(end['small_adaptive'])} of AR."
        )
    least = min(row["window_tokens"] / row["tokens_per_forward"] for row in profile)
    lines.append(
        "- Where arithmetic is the limit, D2F loses: with blocks of "
        f"{small} even the window that wastes least computes {least:.1f} positions for each token "
        "that it keeps, AR one. Adaptation narrows the gap, and smaller blocks narrow it more."
    )
    at = {row["batch_size"]: row for row in report["tables"]["7B, H100"]}
    for size, ratio in PUBLISHED["EAGLE-3"].items():
        cells = {name: at[size][key] for key, name in names.items() if size in at}
        said = [
            f"{name} {record.show(cell)}, {beside(cell, ratio)}" for name, cell in cells.items()
        ]
        if said:
            lines.append(f"- {size} at once on an H100, EAGLE-3 {ratio:g}: {'; '.join(said)}.")
    return lines


def up_to(rows: Sequence[Mapping[str, Any]], key: str, end: str) -> int:
    """Return the most requests at once up to which D2F is nowhere slower than AR, or 0."""
    ahead = itertools.takewhile(lambda row: row[key][end] >= 1, rows)
    return max((row["batch_size"] for row in ahead), default=0)


def beside(cell: Mapping[str, float], ratio: float) -> str:
    """Say whether a published ratio is below, in or above the range."""
    if cell["max"] < ratio:
        return "below it in every case"
    return "above it in every case" if cell["min"] > ratio else "which has it in its range"


def markdown(report: Mapping[str, Any]) -> list[str]:
    widest, small = report["profile"][-1]["blocks"], report["block_size"]
    titles = {"batch_size": "requests at once", "dream_blocks": "blocks", "small_blocks": "blocks"}
    for name, size in (("dream", DREAM_BLOCK), ("small", small)):
        titles[f"{name}_fixed"] = f"{widest} blocks of {size}"
        titles[f"{name}_adaptive"] = f"adaptive, of {size}"
    keys = "batch_size dream_fixed dream_adaptive dream_blocks small_fixed small_adaptive"
    lines = [
        *record.head("D2F over AR by the cost model", report),
        "**Predicted, not measured**: no model of 7B or 70B has run here. Each cell is D2F / AR in",
        "tokens per second while so many requests are always under way: the middle case, and in",
        f"brackets what the assumptions allow. Prompts of {report['prompt']} tokens, answers of",
        f"{report['answer']}.",
        "",
        *verdict(report),
        "",
    ]
    for target, rows in report["tables"].items():
        lines += [f"## {target}", "", *record.columns(f"{keys} small_blocks", rows, **titles)]
    at = {row["batch_size"]: row for row in report["tables"]["7B, H100"]}
    published = [
        {"published": f"{name} {ratio:g}", **at[size]}
        for name, ratios in PUBLISHED.items()
        for size, ratio in ratios.items()
        if size in at
    ]
    keys = "published batch_size dream_fixed dream_adaptive small_adaptive"
    lines += ["## Published ratios beside 7B on an H100", ""]
    lines += record.columns(keys, published, **titles)
    reached, ceilings = report["reached"], report["ceilings"]
    names = ("copy_gb_per_s", "matmul_gflop_per_s")
    of_copy, of_product = (reached[name] / ceilings[name] for name in names)
    profile = [
        {**row, "positions_per_token": row["window_tokens"] / row["tokens_per_forward"]}
        for row in report["profile"]
    ]
    told = {name: report[name] for name in ("measured_on", "model", "job", "prompts", "block_size")}
    text = PAGE.format(
        **told, score=report["score"].replace("_", " "), settings=json.dumps(report["settings"]),
        copy=ceilings[names[0]], product=ceilings[names[1]] / 1e3, of_copy=of_copy,
        of_product=of_product, h100=GPUS["H100"], h200=GPUS["H200"],
        tflops=GPUS["H100"][1] / 1e3, engines=ENGINES, rates=report["tokens_per_forward"],
        dream=DREAM_BLOCK, times=DREAM_BLOCK / small,
        reduce=", ".join(f"{us:g} us and {rate:g} GB/s" for us, rate in REDUCE),
        profile="\n".join(record.columns(
            "blocks tokens_per_forward window_tokens positions_per_token score score_interval",
            profile,
        )),
        check="\n".join(record.columns(
            "batch_size tokens_per_forward predicted measured error error_d2f error_ar",
            report["check"],)),
        plain_8b="\n".join(record.columns("batch_size predicted published", report["plain_8b"])),
    )  # fmt: skip
    return [*lines, *text.splitlines()]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw D2F / AR against the batch size: a panel per machine, published ratios as marks."""
    drawing, axes = figure.new_figure(height=4.6, columns=len(report["tables"]))
    small = report["block_size"]
    series = {
        "dream_fixed": ("ar", f"{report['profile'][-1]['blocks']} blocks of {DREAM_BLOCK}"),
        "dream_adaptive": ("d2f", f"adaptive, blocks of {DREAM_BLOCK}"),
        "small_adaptive": ("more", f"adaptive, blocks of {small}"),
    }
    for axis, (target, rows) in zip(axes, report["tables"].items(), strict=True):
        sizes = [row["batch_size"] for row in rows]
        for key, (color, label) in series.items():
            low, middle, high = ([r[key][end] for r in rows] for end in ("min", "median", "max"))
            axis.plot(sizes, middle, color=figure.COLORS[color], label=label)
            axis.fill_between(sizes, low, high, color=figure.COLORS[color], alpha=0.12, lw=0)
        for mark, (name, ratios) in zip("os^", PUBLISHED.items(), strict=True):
            if target == "7B, H100":
                style: dict[str, Any] = {
                    "marker": mark,
                    "ls": "",
                    "color": figure.COLORS["vanilla"],
                }
                axis.plot(list(ratios), list(ratios.values()), **style, label=f"{name}, published")
        axis.axhline(1, color="black", lw=0.8)
        figure.logarithmic(axis, "requests at once", "", few_decades=True)
        axis.set_title(target, fontsize=11)
    axes[0].set_ylabel("predicted tokens/s, AR = 1")
    below = dict(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    drawing.legend(*axes[1].get_legend_handles_labels(), **below)
    figure.save(drawing, path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("projection", __doc__)
    add, results = parser.add_argument, Path(__file__).parent / "results" / "h200"
    add("--steps", metavar="FILE", default=str(results / "steps.json"), help="of benchmarks.steps")
    pieces = str(results / "steps_piecewise.json")
    add("--piecewise", metavar="FILE", default=pieces, help="--variant piecewise")
    add("--batch-sizes", type=int, nargs="+", default=[2**i for i in range(9)])
    help = "of the widest window: low, middle, high"
    add("--tokens-per-forward", type=float, nargs=3, default=[2.0, 2.9, 4.5], help=help)
    add("--prompt", type=int, default=512, help="tokens of the prompt")
    add("--answer", type=int, default=256, help="tokens of the answer")
    add("--model", default="d2f-tiny", help="D2F model of the profile: name, folder or Hub id")
    add("--job", choices=["exact", "extract"], default="exact", help="how its answers are scored")
    add("--data", help='JSONL with "prompt" and "response" (default: generated problems)')
    add("--settings", default="{}", metavar="JSON", help="D2F settings of the profile")
    add("--blocks", type=int, default=4, help="blocks of the profile's widest window")
    add("--prompts", type=int, default=64)
    add("--profile-batch", type=int, default=16)
    add("--max-tokens", type=int, default=128)
    add("--max-model-len", type=int, default=512)
    add("--dtype", default="float32")
    positive = ("batch_sizes", "prompt", "answer", "blocks", "prompts", "profile_batch")
    args = parser.finish(argv, QUICK, (*positive, "tokens_per_forward", "max_tokens"))
    args.batch_sizes = sorted(set(args.batch_sizes))
    return args


def projection(run: Record) -> None:
    """Measure the profile, predict and report."""
    from transformers import AutoTokenizer

    args, job = run.args, JOBS[run.args.job]
    steps = cost.read_steps("--steps", args.steps)
    reached, beside = engines(steps, cost.read_steps("--piecewise", args.piecewise))
    model, config, own = d2f_model("--model", args.model)
    refuse_simulated(f"--model {args.model}", config, "a decoding profile")
    try:
        params = replace(own.params, **parse_options("--settings", args.settings))
        windows = [replace(params, max_blocks=1 + more) for more in range(args.blocks)]
    except (TypeError, ValueError) as error:
        raise UsageError(f"--settings {args.settings}: {error}") from None
    items = load_job(args.data, args.prompts, args.seed, AutoTokenizer.from_pretrained(model))

    @cache
    def engine() -> Any:
        from benchmarks.harness.engine import Engine

        section = {"d2f": {"window": params.block_size * max(args.blocks, params.max_blocks)}}
        options: dict[str, Any] = {"max_model_len": args.max_model_len, "dtype": args.dtype}
        options["additional_config"] = section
        most = {"max_batch": args.profile_batch, "max_tokens": args.max_tokens}
        return Engine(model, mode=most_modes()[0], **most, options=options)

    def measure(chosen: Any) -> Any:
        from benchmarks.harness.engine import greedy

        engine().sampling = greedy(args.max_tokens, chosen)
        batches = engine().measure(items, args.profile_batch)
        answers = [answer for batch in batches for answer in batch.answers]
        counts = [job.counts(items[a.item].answer or "", a.complete) for a in answers]
        return {"trace": asdict(Trace.mean(cost.traces_of(batches))), "score": interval(counts)}

    for chosen in windows:
        run.point(f"profile {chosen.max_blocks}", partial(measure, chosen))
    run.need_all()
    found = [run.points[f"profile {chosen.max_blocks}"] for chosen in windows]
    traces = [Trace(**one["trace"]) for one in found]
    profile = [
        {"blocks": chosen.max_blocks, **trace.as_dict(), "score": rounded(one["score"][0]),
         "score_interval": [rounded(end) for end in one["score"][1:]]}
        for chosen, trace, one in zip(windows, traces, found, strict=True)
    ]  # fmt: skip
    about = {name: getattr(args, name) for name in ("model", "job", "prompts")}
    about |= {"score": job.score, "settings": parse_options("--settings", args.settings)}
    parts = build(steps, reached, beside, traces, params.block_size, args)
    run.write(run.report(**about, profile=profile, **parts))


FIGURES = {"": draw}
main = record.command(parse, projection, markdown, FIGURES)

if __name__ == "__main__":
    sys.exit(main())
