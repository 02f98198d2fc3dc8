# SPDX-License-Identifier: Apache-2.0
"""D2F against what a user would pick instead, with the score beside every speed.

    python -m benchmarks.versus                                   # the embedded models
    python -m benchmarks.versus --d2f FOLDER --ar FOLDER --job extract --data test.jsonl \\
        --dtype bfloat16

The decoders are D2F, its autoregressive twin, and the twin with vLLM's n-gram speculation, each in
its own process with the same data type and threads. All answer the same prompts in turn, so that a
ratio compares what was measured moments apart. `--scored N` lets each of them answer N prompts in
the largest batch first, for the score. `--settings NAME=JSON` adds D2F with other settings, such as
`adaptive={"adaptive_window": true}`. With `--schema` every decoder answers the same prompts under
the job's JSON schema too, in rows of their own. `--teacher` adds vanilla diffusion by a
bidirectional model, in plain transformers and one request at a time. `--loads` lets requests come
in one by one at random (Poisson) at these shares of what the twin answers per second in the largest
batch.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.harness import figure, record
from benchmarks.harness.engine import Answer, Batch, answers, paired, rate
from benchmarks.harness.record import Record
from benchmarks.harness.timing import percentiles, rounded, spread
from benchmarks.harness.worker import Decoder, Worker, prepare_process, workers
from benchmarks.harness.workload import Item, parse_options, resolve_model
from benchmarks.tasks.jobs import JOBS, Job, load_job
from training.intervals import difference, interval

if TYPE_CHECKING:
    from benchmarks.harness.vanilla import Setting

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
QUICK: dict[str, Any] = dict(batch_sizes=[1, 4], loads=[0.5], runs=2, prompts=4, scored=8)
NAMES = {"ar": "autoregressive", "ar+ngram": "autoregressive with n-gram speculation"}


Variants = Mapping[str, Mapping[str, Any] | None]
"""The schema of each way of asking, by what follows a decoder's name in the tables."""


def under(schema: Mapping[str, Any] | None, items: Sequence[Item]) -> list[Item]:
    """Return the items, asked under a schema."""
    return [replace(item, schema=schema) for item in items]


def measure(
    items: Sequence[Item],
    size: int,
    run: int,
    decoders: Mapping[str, Worker],
    asked: Variants,
    vanilla: Mapping[str, "Setting"],
) -> Any:
    """Measure one batch size in one run: every decoder once in each way, in alternating order.

    Vanilla diffusion, the decoders in `vanilla`, takes part at batch size 1 and knows no schema.
    """
    found = {}
    for name in list(decoders)[:: 1 if run % 2 == 0 else -1]:
        if name in vanilla:
            if size == 1:
                found[name] = decoders[name].measure(items, vanilla[name])
            continue
        for way, schema in asked.items():
            found[name + way] = decoders[name].measure(under(schema, items), size)
    return found


def arrive(
    items: Sequence[Item], at_s: Sequence[float], decoders: Mapping[str, Worker], asked: Variants
) -> Any:
    """Measure one load: every decoder gets the same requests at the same times."""
    return {
        name + way: worker.arrive(under(schema, items), at_s)
        for name, worker in decoders.items()
        for way, schema in asked.items()
    }


def arrivals(count: int, per_s: float, seed: int) -> list[float]:
    """Return the arrival times of a Poisson process, in seconds after the first request."""
    rng = random.Random(seed)
    gaps = [rng.expovariate(per_s) for _ in range(count - 1)]
    return list(itertools.accumulate(gaps, initial=0.0))


def cell(job: Job, items: Sequence[Item], every: Sequence[Answer], of_ar: Sequence[Answer]) -> Any:
    """Score the answers of one cell of the table, and tell whether they leave the control's."""
    ours, theirs = (
        [job.counts(items[a.item].answer or "", a.complete) for a in answers]
        for answers in (every, of_ar)
    )
    found = {**_with_interval("score", interval(ours))}
    if len(ours) == len(theirs):
        _, low, high = difference(ours, theirs)
        found["leaves_the_control"] = not low <= 0 <= high
    return found


def scored(job: Job, items: Sequence[Item], batches: Mapping[str, Any]) -> dict[str, Any]:
    """Return each decoder's score with its interval, and how it compares with the twin's answers.

    Questions that training has not seen, where the job knows them, have a score of their own.
    """
    counts, rows, texts = {}, {}, {}
    new = [job.unseen(item.answer or "") for item in items] if job.unseen else []
    for name, done in batches.items():
        every = [a for batch in done for a in Batch.from_dict(batch).answers]
        pairs = [(items[a.item].answer or "", a.complete) for a in every]
        counts[name] = [job.counts(*pair) for pair in pairs]
        texts[name] = [a.text for a in every]
        apart = [one for a, one in zip(every, counts[name], strict=True) if new and new[a.item]]
        tokens, forwards = sum(a.useful for a in every), sum(a.forwards for a in every)
        rows[name] = {
            "answers": len(every),
            **_with_interval("score", interval(counts[name])),
            "tokens_per_forward": rounded(tokens / forwards),
            "tokens": tokens,
            **{key: rounded(value) for key, value in job.figures(pairs).items()},
        }
        if apart:
            rows[name] |= {"answers_unseen": len(apart)}
            rows[name] |= _with_interval(f"{job.score}_unseen", interval(apart))
    for name in rows if "ar" in rows else ():
        found = difference(counts[name], counts["ar"])
        rows[name] |= _with_interval("against_ar", found)
        rows[name]["leaves_the_control"] = not found[1] <= 0 <= found[2]
        alike = map(job.same, texts["ar"], texts[name])
        rows[name] |= _with_interval("agreement", interval([(float(one), 1.0) for one in alike]))
    return rows


def _with_interval(name: str, value: tuple[float, float, float]) -> dict[str, Any]:
    middle, *ends = map(rounded, value)
    return {name: middle, f"{name}_interval": ends}


def build(
    job: Job, items: Sequence[Item], sizes: Sequence[int], runs: int, points: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report's parts."""
    table = []
    for size in sizes:
        done: dict[str, list[list[Batch]]] = {}
        for run in range(runs):
            for name, batches in points[f"run {run}, batch {size}"].items():
                done.setdefault(name, []).append([Batch.from_dict(b) for b in batches])
        for name, of in sorted(done.items()):
            every = answers(of)
            table.append({
                "decoder": name, "batch_size": size,
                "tokens_per_s": spread(map(rate, of)),
                "against_ar": paired(of, done["ar"]) if "ar" in done else None,
                "step_ms": spread(
                    1e3 * sum(b.seconds for b in r) / sum(b.steps for b in r) for r in of
                ),
                "tokens_per_forward": rounded(
                    sum(a.useful for a in every) / sum(a.forwards for a in every)
                ),
                "answers_per_run": len(answers(of[:1])),
                **cell(job, items, every, answers(done.get("ar", ()))),
            })  # fmt: skip
    under_load = []
    for key, of_load in points.items():
        for name, batches in of_load.items() if key.startswith("load ") else ():
            (batch,) = map(Batch.from_dict, batches)
            (control,) = map(Batch.from_dict, of_load.get("ar", batches))
            seconds = percentiles(a.last_s for a in batch.answers)
            under_load.append({
                "load": float(key.removeprefix("load ")), "decoder": name,
                "tokens_per_s": rounded(rate([batch])),
                **{f"answer_s_{name}": value for name, value in seconds.items()},
                "median_against_ar": rounded(
                    percentiles(a.last_s for a in control.answers)["p50"] / seconds["p50"]
                ),
                "tokens_per_forward": rounded(
                    sum(a.useful for a in batch.answers) / sum(a.forwards for a in batch.answers)
                ),
                **cell(job, items, batch.answers, control.answers),
            })  # fmt: skip
    scores = scored(job, items, points["scores"])
    return {
        "benchmark": "versus",
        "score": job.score,
        "scores": scores,
        "points": table,
        "loads": under_load,
    }


def markdown(report: Mapping[str, Any]) -> list[str]:
    rows = [{"decoder": name, **row} for name, row in report["scores"].items()]
    about = (
        f"Job `{report['job']}`. Ranges of scores are 95 % intervals over the answers, "
        "`against ar` is of the difference on the same questions; ranges of speeds are over the "
        f"runs. A score is {report['score'].replace('_', ' ')}. `agreement` is the share of "
        "answers that say what the twin's say."
    )
    unseen = f"{report['score']}_unseen"
    if any(unseen in row for row in rows):
        about += f" `{unseen.replace('_', ' ')}` is of questions about what training has not seen."
    other = f"agreement agreement_interval answers_unseen {unseen} {unseen}_interval slots records "
    other += "valid punctuation_f1 case_f1 numbers exact"
    shown = " ".join(key for key in other.split() if any(key in row for row in rows))
    return [
        *record.head("D2F against its alternatives", report),
        about,
        "",
        *record.columns(
            "decoder answers score score_interval against_ar against_ar_interval "
            f"leaves_the_control tokens_per_forward {shown}",
            rows,
        ),
        *record.columns(
            "batch_size decoder tokens_per_s against_ar tokens_per_forward step_ms score "
            "leaves_the_control",
            report["points"],
            against_ar="tokens/s against ar",
        ),
        *_loads(report["loads"]),
    ]


def _loads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    about = (
        "Requests that come in one by one at random, at a share (load) of what the twin answers "
        "per second in the largest batch. Seconds count from a request to its last token; `median "
        "against ar` says how many times shorter the median is than the twin's."
    )
    return [
        about,
        "",
        *record.columns(
            "load decoder answer_s_p50 answer_s_p99 median_against_ar tokens_per_forward score "
            "leaves_the_control",
            rows,
        ),
    ]


def draw(report: Mapping[str, Any], path: Any) -> None:
    """Draw tokens per second over those of the twin, against the batch size."""
    drawing, axes = figure.new_figure()
    palette = iter(figure.COLORS.values())
    for name in dict.fromkeys(point["decoder"] for point in report["points"]):
        rows = [p for p in report["points"] if p["decoder"] == name and p["against_ar"]]
        low, middle, high = ([p["against_ar"][k] for p in rows] for k in ("min", "median", "max"))
        # Vanilla diffusion answers the timed questions only.
        scored = report["scores"].get(name, rows[0] if rows else {})
        score, color = scored.get("score", 0.0), next(palette, "#333333")
        sizes = [p["batch_size"] for p in rows]
        label = f"{NAMES.get(name, name)}, {report['score'].replace('_', ' ')} {score:.1%}"
        axes.plot(sizes, middle, marker="o", color=color, label=label)
        axes.fill_between(sizes, low, high, color=color, alpha=0.15, lw=0)
    figure.logarithmic(axes, "requests at once", "tokens/s, autoregressive = 1", few_decades=True)
    axes.set_xticks(sorted({p["batch_size"] for p in report["points"]}))
    figure.legend_below(axes)
    figure.save(drawing, path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("versus", __doc__)
    add = parser.add_argument
    add("--d2f", default="d2f-tiny", help="D2F model: name, folder or Hub id")
    add("--ar", default="ar-tiny", help="its autoregressive twin")
    add("--job", choices=sorted(JOBS), default="exact", help="how answers are scored")
    add("--data", help='JSONL with "prompt" and "response" (default: generated problems)')
    add("--settings", nargs="*", default=[], metavar="NAME=JSON", help="D2F with other settings")
    add("--schema", action="store_true", help="ask under the job's JSON schema as well")
    add("--teacher", help="bidirectional model for vanilla diffusion (default: none)")
    add("--vanilla", nargs="+", default=["128:1"], metavar="LEN:PER_STEP", help="its canvases")
    add("--no-ngram", action="store_true", help="leave n-gram speculation out")
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    add("--loads", type=float, nargs="*", default=[], help="shares of the twin's best rate")
    add("--runs", type=int, default=3)
    add("--prompts", type=int, default=16, help="prompts per run and batch size, at least")
    add("--scored", type=int, default=256, help="prompts for the score")
    add("--max-tokens", type=int, default=128)
    add("--dtype", default="float32", help="data type of all models")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for all engines")
    args = parser.finish(argv, QUICK, ("batch_sizes", "runs", "prompts", "scored", "max_tokens"))
    if args.schema and JOBS[args.job].schema is None:
        parser.error(f"--schema: the job {args.job} has no JSON schema")
    if any(share <= 0 for share in args.loads):
        parser.error("--loads must be greater than 0")
    if args.teacher and min(args.batch_sizes) != 1:
        parser.error("--teacher is compared at batch size 1: add 1")
    return args


def versus(run: Record) -> None:
    """Measure every batch size in every run and report."""
    from transformers import AutoTokenizer

    from benchmarks.harness.vanilla import parse_settings

    args, job = run.args, JOBS[run.args.job]
    d2f, ar = resolve_model("--d2f", args.d2f), resolve_model("--ar", args.ar)
    sizes = sorted(set(args.batch_sizes))
    count = max(args.scored, *(-(-args.prompts // size) * size for size in sizes))
    items = load_job(args.data, count, args.seed, AutoTokenizer.from_pretrained(ar))
    options = {"dtype": args.dtype, **parse_options("--engine-args", args.engine_args)}
    asked: Variants = {"": None, "+schema": job.schema} if args.schema else {"": None}
    table = [Decoder("d2f", d2f, "eager", options), Decoder("ar", ar, "eager", options)]
    for setting in args.settings:
        name, _, text = setting.partition("=")
        section = {"d2f": parse_options("--settings", text)}
        table.append(Decoder(name, d2f, "eager", options | {"additional_config": section}))
    if not args.no_ngram:
        table.append(Decoder("ar+ngram", ar, "eager", options | {"speculative_config": NGRAM}))
    vanilla = {}
    if args.teacher:
        teacher = resolve_model("--teacher", args.teacher)
        settings = parse_settings("--vanilla", args.vanilla)
        vanilla = {f"vanilla {setting}": setting for setting in settings}
        table += [Decoder(name, teacher, "vanilla") for name in vanilla]
    keys = {f"run {n}, batch {size}": (n, size) for n in range(args.runs) for size in sizes}
    loads = [f"load {share:g}" for share in args.loads]
    if not all(run.settled(key) for key in ("scores", *keys, *loads)):
        with workers(table, max(sizes), args.max_tokens) as decoders:
            engines = {name: worker for name, worker in decoders.items() if name not in vanilla}
            for worker in engines.values():
                for schema in asked.values():
                    worker.warm_up(under(schema, items), sizes[:1])
            scored_items = items[: args.scored]
            run.point("scores", partial(measure, scored_items, max(sizes), 0, engines, asked, {}))
            for key, (number, size) in keys.items():
                some = items[: -(-args.prompts // size) * size]
                run.point(key, partial(measure, some, size, number, decoders, asked, vanilla))
            for share, key in zip(args.loads, loads, strict=True):
                largest = run.points[f"run 0, batch {max(sizes)}"]["ar"]
                done = [Batch.from_dict(one) for one in largest]
                per_s = share * len(answers([done])) / sum(one.seconds for one in done)
                at_s = arrivals(args.prompts, per_s, args.seed)
                run.point(key, partial(arrive, items[: args.prompts], at_s, engines, asked))
    run.need_all()
    parts = build(job, items, sizes, args.runs, run.points)
    models = {"d2f": args.d2f, "ar": args.ar} | ({"teacher": args.teacher} if vanilla else {})
    run.write(run.report(job=args.job, models=models, settings=args.settings, **parts))


main = record.command(parse, versus, markdown, {"": draw}, prepare_process)

if __name__ == "__main__":
    sys.exit(main())
