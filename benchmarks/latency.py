# SPDX-License-Identifier: Apache-2.0
"""Predict tokens per second by batch size from what a step costs, and where D2F and AR cross.

    python -m benchmarks.latency                        # measure, fit, predict, check
    python -m benchmarks.latency --quick                # under a minute
    python -m benchmarks.latency --steps steps.json     # from what `benchmarks.steps` measured

A step costs about a + b * tokens + c * (cached tokens its requests attend to) + d * (requests that
enter with it) milliseconds; a to d are fitted to measured steps. How many forwards a request takes
and how wide its window is does not depend on the batch: both are measured once, at batch size 1.
From the two follows the speed at any batch size. The prediction is checked on other problems than
the fit has seen.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import cost, figure, record, shapes
from benchmarks.harness.cost import Cost, Trace
from benchmarks.harness.engine import Batch, StepCost
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.timing import spread
from benchmarks.harness.worker import Decoder, Worker, most_modes, prepare_process, workers
from benchmarks.harness.workload import load_items, parse_options, resolve_model

SIZES = tuple(2**i for i in range(11))
KINDS = ("d2f", "ar")
MOST_STEPS = 500
"""Roughly how many steps of each decoder the picture shows. The fit uses all of them."""
UNITS = {
    "cost": "milliseconds of a step, per token in it, per cached token, per request that enters",
    "steps": "measured: requests, new ones, tokens, context tokens, milliseconds of each step",
    "predicted": "useful tokens per second of a server that always has batch_size requests",
    "checks": "useful tokens per second of one LLM.generate call with batch_size prompts",
    "measured_runs": "the same, run by run; D2F and AR took turns in each",
    "error": "predicted / measured - 1",
    "ar_overtakes_at_batch": "predicted: fewest requests, always so many, at which AR is faster",
    "checked_ratio": "D2F / AR of single batches: predicted, and measured run by run",
    "checked_crossing": "smallest batch of the measured sizes at which AR is faster, null: none",
}
CLOCKS = {
    "wall": "Times are wall time.",
    "cpu": "Times are CPU time of the decoder's process: other programs were running.",
    "steps": "Fitted to the steps of `benchmarks.steps`, checked on its batches.",
}
QUICK: dict[str, Any] = dict(batch_sizes=[1, 4], runs=1, prompts=4)


def measured(run: Record) -> dict[str, dict[str, Any]]:
    """Measure step costs and traces on the first half of the problems, speed on the other half.

    The decoders take turns, and the fit and what checks it are measured side by side.
    """
    args = run.args
    models = {"d2f": resolve_model("--d2f", args.d2f), "ar": resolve_model("--ar", args.ar)}
    items = load_items(2 * max(*args.batch_sizes, args.prompts), args.data, args.seed)
    known, fresh = items[: len(items) // 2], items[len(items) // 2 :]
    options = {"max_num_batched_tokens": args.token_budget}
    options |= parse_options("--engine-args", args.engine_args)
    mode = args.mode or most_modes()[0]
    table = [Decoder(kind, model, mode, options) for kind, model in models.items()]
    per = "cpu_s" if args.clock == "cpu" else "seconds"

    def one(size: int) -> dict[str, Any]:
        count = max(size, args.prompts // size * size)
        found: dict[str, Any] = {}
        for kind, worker in decoders.items():
            steps = worker.steps(known[:count], size)
            batches = worker.measure(fresh[:count], size)
            useful = sum(a.useful for b in batches for a in b.answers)
            seconds = sum(getattr(b, per) for b in batches)
            found[kind] = {"steps": steps, "speed": useful / max(seconds, 1e-9)}
        return found

    def alone(worker: Worker) -> dict[str, Any]:
        return {"simulated": worker.simulated, "batches": worker.measure(known, 1)}

    with workers(table, max(args.batch_sizes), args.max_tokens) as decoders:
        for worker in decoders.values():
            worker.warm_up(known, args.batch_sizes)
        for number in range(args.runs):
            for size in args.batch_sizes:
                run.point(f"run {number}, batch {size}", partial(one, size))
        for kind, worker in decoders.items():
            run.point(f"alone, {kind}", partial(alone, worker))
    run.need_all()
    out = {}
    for kind in KINDS:
        by_size = {
            size: [run.points[f"run {n}, batch {size}"][kind] for n in range(args.runs)]
            for size in args.batch_sizes
        }
        speeds = {size: [found["speed"] for found in runs] for size, runs in by_size.items()}
        every = (found for runs in by_size.values() for found in runs)
        steps = [StepCost(**step) for found in every for step in found["steps"]]
        if args.clock == "cpu":
            steps = [replace(step, ms=step.cpu_ms) for step in steps]
        found = run.points[f"alone, {kind}"]
        batches = [Batch.from_dict(batch) for batch in found["batches"]]
        given = [answer for batch in batches for answer in batch.answers]
        out[kind] = decoder(steps, cost.traces_of(batches), speeds, args.token_budget) | {
            "score": round(sum(answer.final for answer in given) / len(given), 4),
            "simulated_tokens_per_forward": found["simulated"],
        }
    return out


def decoder(
    steps: Sequence[StepCost],
    traces: Sequence[Trace],
    speeds: Mapping[int, Sequence[float]],
    budget: int,
    knots: bool = False,
) -> dict[str, Any]:
    """Fit one decoder, and check it against `speeds`, tokens per second by batch size."""
    fitted = cost.fit(steps, knots)
    checks = []
    for size, runs in speeds.items():
        range_ = spread(runs)
        predicted = cost.predict_batch(fitted, traces, size, budget)
        checks.append({
            "batch_size": size, "predicted": float(f"{predicted:.5g}"),
            "measured": range_["median"], "measured_range": range_,
            "measured_runs": [float(f"{s:.5g}") for s in runs],
            "error": round(predicted / range_["median"] - 1, 4),
        })  # fmt: skip
    names = ("requests", "new", "tokens", "context")
    some = steps[:: max(1, len(steps) // MOST_STEPS)]
    return {
        "cost": asdict(fitted), "fit_error": fitted.relative_error(steps),
        "trace": Trace.mean(traces).as_dict(), "checks": checks,
        "steps": [{name: getattr(s, name) for name in names} | {"ms": round(s.ms, 3)}
                  for s in some],
    }  # fmt: skip


def from_steps(path: str, d2f: str, rate: float) -> dict[str, dict[str, Any]]:
    """Return costs and traces of the steps that `benchmarks.steps` measured on dummy weights."""
    points = cost.read_steps("--steps", path)["points"]
    out = {}
    for kind, shape, per in (("d2f", d2f, rate), ("ar", shapes.D2F[d2f], 1.0)):
        found = [
            tuple(row)
            for point in cost.steps_of(points, shape)
            for row in [*point["entering"], *point["steps"]]
        ]
        speeds = cost.speeds_of(points, shape, per)
        if len({row[2] for row in found}) < 2 or 1 not in speeds:
            raise UsageError(
                f"--steps {path}: {shape} needs steps of at least two sizes and "
                f"{shape}/speed/{per:g}/1; run benchmarks.steps --shapes {shape}"
            )
        # A step that enters twice in the file counts once.
        steps = [StepCost(*row) for row in sorted(set(found))]
        trace, budget = cost.simulated_trace(speeds[1]), speeds[1].get("token_budget", 32768)
        by_size = {size: [speed["tokens_per_s"]] for size, speed in speeds.items()}
        out[kind] = decoder(steps, [trace], by_size, budget, knots=True)
        out[kind] |= {"shape": shape, "simulated_tokens_per_forward": None}
    out["d2f"]["simulated_tokens_per_forward"] = rate
    return out


def build(decoders: dict[str, dict[str, Any]], clock: str) -> dict[str, Any]:
    """Return the report's parts: predictions by batch size and where they cross."""
    speeds = {}
    given = {k: (Cost.from_dict(d["cost"]), Trace(**d["trace"])) for k, d in decoders.items()}
    for kind, one in decoders.items():
        speeds[kind] = {size: cost.predict_steady(*given[kind], size) for size in SIZES}
        one["predicted"] = [
            {"batch_size": size, "tokens_per_s": float(f"{speed:.5g}")}
            for size, speed in speeds[kind].items()
        ]
    errors = [abs(check["error"]) for one in decoders.values() for check in one["checks"]]
    error = {"mean": sum(errors) / len(errors), "worst": max(errors)}
    ratios = {str(size): round(speeds["d2f"][size] / speeds["ar"][size], 3) for size in SIZES}
    return {
        "benchmark": "latency", "predicted_speedup": ratios,
        "ar_overtakes_at_batch": cost.crossing(*given["d2f"], *given["ar"]),
        **_checked_crossing(decoders),
        "prediction_error": {name: round(value, 3) for name, value in error.items()},
        "simulated_tokens_per_forward": decoders["d2f"].get("simulated_tokens_per_forward"),
        "clock": clock, "units": UNITS, "decoders": decoders,
    }  # fmt: skip


def _checked_crossing(decoders: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return D2F / AR of single batches and where it falls below 1, predicted and measured."""
    d2f, ar = ({c["batch_size"]: c for c in decoders[kind]["checks"]} for kind in KINDS)
    rows = []
    for size in sorted(d2f.keys() & ar.keys()):
        d, a = d2f[size], ar[size]
        ratios = [x / y for x, y in zip(d["measured_runs"], a["measured_runs"], strict=True)]
        predicted = float(f"{d['predicted'] / a['predicted']:.4g}")
        rows.append({"batch_size": size, "predicted": predicted, "measured": spread(ratios)})
    found: dict[str, Any] = {"largest_batch": max(row["batch_size"] for row in rows)}
    for name in ("predicted", "measured"):
        values = [row[name] if name == "predicted" else row[name]["median"] for row in rows]
        by_size = dict(zip((row["batch_size"] for row in rows), values, strict=True))
        found[name] = next((size for size, ratio in by_size.items() if ratio < 1), None)
        found[f"{name}_between"] = cost.falls_below_1(by_size)
    return {"checked_ratio": rows, "checked_crossing": found}


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return the tables of `benchmarks/results/latency_model.md`."""
    lines = [*record.head("Step cost and what follows from it", report), CLOCKS[report["clock"]]]
    lines.append("")
    for kind, d in report["decoders"].items():
        t = d["trace"]
        lines.append(
            f"- {kind}: step {Cost.from_dict(d['cost'])}; {t['tokens_per_forward']:.2f} tokens per "
            f"forward, window {t['window_tokens']:.1f}, answer {t['answer_tokens']:.1f}, prompt "
            f"{t['prompt_tokens']:.1f} tokens"
        )
    at = report["ar_overtakes_at_batch"]
    where = "nowhere up to 4096" if at is None else f"at {at}"
    lines += ["", f"AR overtakes D2F {where} concurrent requests (predicted).", ""]
    d2f, ar = (report["decoders"][kind]["predicted"] for kind in KINDS)
    lines += record.table(
        ("concurrent requests", "D2F tok/s", "AR tok/s", "D2F / AR"),
        (
            map(record.show, (d["batch_size"], d["tokens_per_s"], a["tokens_per_s"], ratio))
            for d, a, ratio in zip(d2f, ar, report["predicted_speedup"].values(), strict=True)
        ),
    )
    found, error = report["checked_crossing"], report["prediction_error"]
    overtakes = {
        name: f"at {found[name]}" if found[name] else f"nowhere up to {found['largest_batch']}"
        for name in ("measured", "predicted")
    }
    checks = [{"decoder": k, **c} for k, d in report["decoders"].items() for c in d["checks"]]
    return [
        *lines,
        "Checked on other problems than the fit has seen, one batch at a time. In such batches",
        "AR overtakes D2F {measured}, predicted {predicted}.".format(**overtakes),
        "",
        *record.columns("batch_size predicted measured", report["checked_ratio"]),
        f"Off by {error['mean']:.1%} on average, {error['worst']:.1%} at worst.",
        "",
        *record.columns("decoder batch_size predicted measured_range error", checks),
    ]


def draw_forward_cost(report: Mapping[str, Any], path: Path) -> None:
    """Draw the time of a step against its tokens: measured steps as dots, the fit as a line.

    Steps that take in prompts are drawn as crosses; handing in a request is part of their time.
    """
    drawing, axes = figure.new_figure()
    for kind, one in report["decoders"].items():
        law, color = Cost.from_dict(one["cost"]), figure.COLORS[kind]
        plain = sorted((row for row in one["steps"] if not row["new"]), key=lambda r: r["tokens"])
        for style, rows in ((".", plain), ("x", [row for row in one["steps"] if row["new"]])):
            tokens, ms = ([row[name] for row in rows] for name in ("tokens", "ms"))
            axes.plot(tokens, ms, style, color=color, alpha=0.3, ms=6)
        context = statistics.median(row["context"] / row["requests"] for row in plain)
        per_request = statistics.median(row["tokens"] / row["requests"] for row in plain)
        counts = [row["tokens"] for row in plain]
        fitted = [law.ms(tokens, context * tokens / per_request) for tokens in counts]
        label = f"{figure.NAMES[kind]}: {law.ms(0, 0):.1f} ms"
        if not law.points:
            label += f" + {1e3 * law.b_ms_per_token:.0f} µs a token"
        axes.plot(counts, fitted, color=color, lw=2, label=label)
    figure.logarithmic(axes, "tokens in the step (x: with prompts)", "milliseconds per step")
    axes.legend(frameon=False)
    figure.label_simulated(axes, report)
    figure.save(drawing, path)


def draw_prediction(report: Mapping[str, Any], path: Path) -> None:
    """Draw predicted tokens per second by batch size, with the measured ones as points."""
    drawing, axes = figure.new_figure(height=5.2)
    for kind, one in report["decoders"].items():
        for rows, field, style, what in (
            ("predicted", "tokens_per_s", "-", "steady load predicted"),
            ("checks", "measured", "o", "batch measured"),
            ("checks", "predicted", "x", "that batch predicted"),
        ):
            sizes, values = ([row[name] for row in one[rows]] for name in ("batch_size", field))
            label = f"{figure.NAMES[kind]}, {what}"
            axes.plot(sizes, values, style, color=figure.COLORS[kind], label=label)
    figure.logarithmic(axes, "requests at once", "useful tokens per second", few_decades=True)
    figure.legend_below(axes)
    figure.label_simulated(axes, report)
    figure.save(drawing, path)


FIGURES = {"": draw_prediction, "_forward_cost": draw_forward_cost}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("latency", __doc__)
    add = parser.add_argument
    add("--d2f", default="d2f-tiny", help="D2F model: embedded name, folder or Hub id")
    add("--ar", default="ar-tiny", help="autoregressive model")
    add("--batch-sizes", type=int, nargs="+", default=[2**i for i in range(9)])
    add("--runs", type=int, default=3)
    add("--prompts", type=int, default=32, help="prompts per run and batch size, at least")
    add("--max-tokens", type=int, default=64)
    add("--token-budget", type=int, default=8192, help="vLLM's max_num_batched_tokens")
    help = "of vLLM (default: eager, on a GPU compiled, which is vLLM's own default)"
    add("--mode", choices=("eager", "compiled"), help=help)
    help = "cpu: CPU time, for a CPU that other programs share (never for a GPU)"
    add("--clock", choices=("wall", "cpu"), default="wall", help=help)
    add("--data", help='JSONL with "question" and "answer" (default: generated problems)')
    add("--steps", metavar="FILE", help="a result of benchmarks.steps; nothing is measured")
    add("--shape", choices=list(shapes.D2F), default="dream", help="with --steps")
    add("--rate", type=float, default=2.9, help="with --steps: tokens per forward")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for both vLLM engines")
    return parser.finish(argv, QUICK, ("batch_sizes", "runs", "prompts", "max_tokens"))


def latency(run: Record) -> None:
    """Fit, predict, check and report."""
    args = run.args
    if args.steps:
        parts = build(from_steps(args.steps, args.shape, args.rate), "steps")
    else:
        parts = build(measured(run), args.clock)
    run.write(run.report(**parts))


main = record.command(parse, latency, markdown, FIGURES, prepare_process)

if __name__ == "__main__":
    sys.exit(main())
