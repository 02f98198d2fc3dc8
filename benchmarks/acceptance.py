# SPDX-License-Identifier: Apache-2.0
"""Tokens per forward against score, for every acceptance rule.

    python -m benchmarks.acceptance --json benchmarks/results/acceptance.json
    python -m benchmarks.acceptance --model d2f-smollm2-extract --job extract --data test.jsonl \\
        --dtype bfloat16 --max-tokens 128 --max-model-len 1024
    python -m benchmarks.acceptance --rules threshold=0.8,0.9 entropy=0.1,0.3,0.6

One engine answers the same prompts under every rule and threshold, as settings travel with a
request. A rule beats `threshold` if it takes more tokens per forward at the same score. That is
read off the line through the points of `threshold`, and its interval comes from drawing the prompts
with replacement. Speed is not measured: all rules run the same forwards.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import figure, record
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.timing import rounded
from benchmarks.harness.worker import most_modes
from benchmarks.harness.workload import Item, d2f_model, parse_options, refuse_simulated
from benchmarks.tasks.jobs import JOBS, Job, load_job
from training.intervals import interval
from vllm_d2f.d2f import D2FParams
from vllm_d2f.strategies import ACCEPT

THRESHOLDS = {
    "threshold": (0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
    "frechet": (0.25, 0.5, 0.75),
    "factor": (0.0, 0.25, 0.5),
    "entropy": (0.2, 0.4, 0.7),
    "leftmost": (0.9, 0.95, 0.99),
}
"""`tau_conf` of each rule; more of `threshold`, which the others are compared with."""

DRAWS = 2000
UNITS = {
    "tokens_per_forward": "tokens up to the end token per forward a request took part in",
    "score": "of the job, with its 95 % interval over the prompts",
    "threshold_at_score": "tokens per forward of `threshold` at the same score, interpolated",
    "gain": "tokens per forward over those, less 1; with its 95 % interval",
}


def ask(engine: Any, job: Job, params: D2FParams, items: Sequence[Item], batch: int) -> Any:
    """Answer all prompts. Return for each what is right, of how much, tokens and forwards."""
    from benchmarks.harness.engine import greedy

    engine.sampling = greedy(engine.sampling.max_tokens, params)
    found = []
    for answer in (answer for one in engine.measure(items, batch) for answer in one.answers):
        counted, of = job.counts(items[answer.item].answer or "", answer.complete)
        right = of - counted if job.errors else counted
        found.append([right, of, answer.useful, answer.forwards])
    return found


def frontier(
    tokens_DP: NDArray[Any], score_DP: NDArray[Any], known: Sequence[int]
) -> NDArray[np.floating]:
    """Return tokens per forward of the known points at the score of each point, [draws, points]."""
    found = np.full(score_DP.shape, np.nan)
    for draw, (tokens_P, score_P) in enumerate(zip(tokens_DP, score_DP, strict=True)):
        rising = sorted(known, key=lambda point: score_P[point])
        # A point also counts at every lower score.
        best = np.maximum.accumulate(tokens_P[rising][::-1])[::-1]
        found[draw] = np.interp(score_P, score_P[rising], best, left=np.nan, right=np.nan)
    return found


def build(job: Job, points: Sequence[tuple[str, float, Any]], seed: int) -> dict[str, Any]:
    """Return the report's parts. A point is a rule, its threshold and what `ask` gave."""
    table_PN4 = np.array([one for _, _, one in points], dtype=float)
    prompts = table_PN4.shape[1]
    drawn_DN = np.random.default_rng(seed).integers(prompts, size=(DRAWS, prompts))
    sums_DP4 = np.stack(
        [table_PN4[:, index_N].sum(1) for index_N in (np.arange(prompts), *drawn_DN)]
    )
    score_DP = sums_DP4[..., 0] / sums_DP4[..., 1]
    tokens_DP = sums_DP4[..., 2] / sums_DP4[..., 3]
    known = [i for i, (rule, _, _) in enumerate(points) if rule == "threshold"]
    there_DP = frontier(tokens_DP, score_DP, known)
    rows = []
    for i, (rule, tau, one) in enumerate(points):
        score, *ends = interval([(right, of) for right, of, *_ in one])
        row = {
            "rule": rule, "tau_conf": tau, "tokens_per_forward": rounded(tokens_DP[0, i]),
            "score": rounded(score), "score_interval": [rounded(end) for end in ends],
        }  # fmt: skip
        if rule != "threshold" and not np.isnan(there_DP[0, i]):
            gain_D = tokens_DP[:, i] / there_DP[:, i] - 1
            low, high = np.nanquantile(gain_D[1:], (0.025, 0.975))
            row |= {
                "threshold_at_score": rounded(there_DP[0, i]), "gain": rounded(gain_D[0]),
                "gain_interval": [rounded(low), rounded(high)], "beats_threshold": bool(low > 0),
            }  # fmt: skip
        rows.append(row)
    shown = f"1 - {job.score}" if job.errors else job.score
    return {"score": shown, "prompts": prompts, "units": UNITS, "rows": rows}


def verdict(report: Mapping[str, Any]) -> str:
    """Say in a sentence which rules beat `threshold`."""
    better = dict.fromkeys(row["rule"] for row in report["rows"] if row.get("beats_threshold"))
    if not better:
        return (
            "**No rule beats `threshold`**: none has a point whose interval of the gain lies above "
            "0. The default stays."
        )
    names = " and ".join(f"`{name}`" for name in better)
    verb = "takes" if len(better) == 1 else "take"
    return f"**{names}** {verb} more tokens per forward than `threshold` at the same score."


def markdown(report: Mapping[str, Any]) -> list[str]:
    asked = (
        f"{report['model']}, job `{report['job']}`, {report['prompts']} prompts "
        f"({report['data']}), at most {report['max_tokens']} tokens, greedy, {report['dtype']}."
    )
    about = (
        f"A score is {report['score'].replace('_', ' ')}. Intervals are 95 % over the prompts, "
        "each for its point alone: of many points one may lie above the line by chance. "
        "`threshold at score` is what `threshold` takes per forward at the same score, on the line "
        "through its points, and `gain` is relative to it. Outside of that line there is no gain."
    )
    keys = "rule tau_conf tokens_per_forward score score_interval threshold_at_score gain"
    return [
        *record.head("Acceptance rules: tokens per forward against score", report),
        *(asked, "", verdict(report), "", about, ""),
        *record.columns(f"{keys} gain_interval", report["rows"]),
    ]


def draw(report: Mapping[str, Any], path: Any) -> None:
    """Score over tokens per forward, a line for each rule."""
    drawing, axes = figure.new_figure()
    palette = iter(figure.COLORS.values())
    for rule in dict.fromkeys(row["rule"] for row in report["rows"]):
        rows = sorted(
            (r for r in report["rows"] if r["rule"] == rule), key=lambda r: r["tokens_per_forward"]
        )
        speed, score = ([row[k] for row in rows] for k in ("tokens_per_forward", "score"))
        low, high = zip(*(row["score_interval"] for row in rows), strict=True)
        color = next(palette, "#333333")
        axes.plot(speed, score, marker="o", color=color, label=rule)
        if rule == "threshold":
            axes.fill_between(speed, low, high, color=color, alpha=0.15, lw=0)
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel(report["score"].replace("_", " "))
    figure.legend_below(axes)
    figure.save(drawing, path)


def thresholds(given: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the thresholds of each rule, from arguments such as `entropy=0.1,0.3`."""
    found = {}
    for text in given:
        rule, _, values = text.partition("=")
        try:
            found[rule] = tuple(float(value) for value in values.split(","))
            for tau in found[rule]:
                D2FParams(accept=rule, tau_conf=tau)
        except ValueError as error:
            raise UsageError(f"--rules {text}: {error}; pass RULE=NUMBER,NUMBER") from None
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("acceptance", __doc__)
    add = parser.add_argument
    defaults = [f"{rule}={','.join(map(str, THRESHOLDS[rule]))}" for rule in ACCEPT]
    add("--model", default="d2f-tiny", help="D2F model: name, folder or Hub id")
    add(
        "--job",
        choices=["exact", "extract", "restore"],
        default="exact",
        help="how answers are scored",
    )
    add("--data", help='JSONL with "prompt" and "response" (default: generated problems)')
    add("--rules", nargs="+", default=defaults, metavar="RULE=TAU,TAU")
    add("--prompts", type=int, default=512)
    add("--batch-size", type=int, default=32)
    add("--max-tokens", type=int, default=64)
    add("--max-model-len", type=int, default=512)
    add("--dtype", default="float32")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for the engine")
    return parser.finish(argv, {"prompts": 16}, ("prompts", "batch_size", "max_tokens"))


def acceptance(run: Record) -> None:
    """Measure every rule at every threshold, and report."""
    from transformers import AutoTokenizer

    args, job = run.args, JOBS[run.args.job]
    rules = thresholds(args.rules)
    model, config, settings = d2f_model("--model", args.model)
    refuse_simulated(f"--model {args.model}", config, "a score")
    items = load_job(args.data, args.prompts, args.seed, AutoTokenizer.from_pretrained(model))
    points = [(rule, tau) for rule, taus in rules.items() for tau in taus]

    @cache
    def engine() -> Any:
        from benchmarks.harness.engine import Engine

        options = {"max_model_len": args.max_model_len, "dtype": args.dtype}
        options |= parse_options("--engine-args", args.engine_args)
        most = {"max_batch": args.batch_size, "max_tokens": args.max_tokens}
        return Engine(model, mode=most_modes()[0], **most, options=options)

    def measure(rule: str, tau: float) -> Any:
        params = replace(settings.params, tau_conf=tau, accept=rule)
        return ask(engine(), job, params, items, args.batch_size)

    for rule, tau in points:
        run.point(f"{rule} {tau}", partial(measure, rule, tau))
    run.need_all()
    parts = build(
        job, [(*point, run.points["{} {}".format(*point)]) for point in points], args.seed
    )
    data = args.data.rpartition("/")[2] if args.data else "generated problems of the test split"
    about = {name: getattr(args, name) for name in ("model", "job", "max_tokens", "dtype")}
    run.write(run.report(**about, data=data, **parts))


FIGURES = {"": draw}
main = record.command(parse, acceptance, markdown, FIGURES)

if __name__ == "__main__":
    sys.exit(main())
