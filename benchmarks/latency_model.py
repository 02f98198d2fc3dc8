# SPDX-License-Identifier: Apache-2.0
"""Predict tokens per second by batch size from what a step costs, and where D2F and AR cross.

    python -m benchmarks.latency_model                  # measure, fit, predict, check
    python -m benchmarks.latency_model --quick          # under a minute
    python -m benchmarks.latency_model --step-ms-json costs.json     # by hand, no engine

A step costs about a + b * tokens + c * (cached tokens its requests attend to) + d * (requests that
enter with it) milliseconds; a to d are fitted to measured steps. How many forwards a request takes
and how wide its window is does not depend on the batch: both are measured once, at batch size 1.
From the two follows the speed at any batch size. The prediction is checked on other problems than
the fit has seen.

The JSON given by hand has, for "d2f" and "ar" each, either a_ms and b_ms_per_token, or "points":
[[tokens, ms], ...] with straight lines between them (a GPU's steps cost the same until it runs out
of arithmetic); c_ms_per_context_token and d_ms_per_request where they are not 0; and
tokens_per_forward, window_tokens, answer_tokens, prompt_tokens: see benchmarks/README.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.costs import Cost, Trace, crossing, fit, predict_batch, predict_steady, traces_of
from benchmarks.points import answers, rate, spread
from benchmarks.throughput_report import simulation_note
from benchmarks.workers import (
    Worker,
    WorkerError,
    close_all,
    device_share,
    most_modes,
    on_gpu,
    prepare_process,
)
from benchmarks.workload import (
    UsageError,
    environment,
    load_items,
    parse_options,
    resolve_model,
    write_result,
)

if TYPE_CHECKING:
    from benchmarks.engine import StepCost

SIZES = tuple(2**i for i in range(11))
KINDS = ("d2f", "ar")
MOST_STEPS = 500
"""About so many steps of each decoder are kept for the picture; the fit sees all of them."""
UNITS = {
    "a_ms": "milliseconds of a step without tokens",
    "b_ms_per_token": "milliseconds per token in the step",
    "c_ms_per_context_token": "milliseconds per cached token the step's requests attend to",
    "d_ms_per_request": "milliseconds per request that enters, its prompt's tokens beside them",
    "steps": "measured: requests, new ones, tokens, context tokens, milliseconds of each step",
    "predicted": "useful tokens per second of a server that always has batch_size requests",
    "checks": "useful tokens per second of one LLM.generate call with batch_size prompts",
    "measured_runs": "the same, run by run; D2F and AR took turns in each",
    "error": "predicted / measured - 1",
    "ar_overtakes_at_batch": "predicted: fewest requests, always so many, at which AR is faster",
    "checked_ratio": "D2F / AR of single batches: predicted, and measured as the median, lowest "
    "and highest of the runs' ratios",
    "checked_crossing": "smallest batch of the measured sizes at which AR is faster, null: none",
}
QUICK: dict[str, Any] = dict(batch_sizes=[1, 4], runs=1, prompts=4)


def measure(workers: Mapping[str, Worker], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Step costs and traces on the first half of the problems, speed on the other half.

    The decoders take turns, and the fit and what checks it are measured side by side.
    """
    items = load_items(2 * max(*args.batch_sizes, args.prompts), args.data, args.seed)
    known, fresh = items[: len(items) // 2], items[len(items) // 2 :]
    steps: dict[str, list[StepCost]] = {kind: [] for kind in workers}
    speeds = {(kind, size): list[float]() for kind in workers for size in args.batch_sizes}
    for worker in workers.values():
        for size in args.batch_sizes:
            worker.measure(known[: max(size, 2)], size)
    for _ in range(args.runs):
        for size in args.batch_sizes:
            count = max(size, args.prompts // size * size)
            for kind, worker in workers.items():
                took = worker.steps(known[:count], size)
                if args.clock == "cpu":
                    took = [replace(step, ms=step.cpu_ms) for step in took]
                steps[kind] += took
                per = "cpu_s" if args.clock == "cpu" else "seconds"
                speeds[kind, size].append(rate(worker.measure(fresh[:count], size), per=per))
    decoders = {}
    for kind, worker in workers.items():
        alone = worker.measure(known, 1)
        cost, traces = fit(steps[kind]), traces_of(alone)
        checks = []
        for size in args.batch_sizes:
            measured = spread(speeds[kind, size])
            predicted = predict_batch(cost, traces, size, args.token_budget)
            error = round(predicted / measured["median"] - 1, 4)
            checks.append(
                {
                    "batch_size": size,
                    "predicted": float(f"{predicted:.5g}"),
                    "measured": measured["median"],
                    "measured_range": measured,
                    "measured_runs": [float(f"{s:.5g}") for s in speeds[kind, size]],
                    "error": error,
                }
            )
        given = answers([alone])
        decoders[kind] = {
            "score": round(sum(answer.final for answer in given) / len(given), 4),
            "simulated_tokens_per_forward": worker.simulated,
            "cost": cost.as_dict(),
            "fit_error": cost.relative_error(steps[kind]),
            "trace": Trace.mean(traces).as_dict(),
            "checks": checks,
            "steps": [_row(s) for s in steps[kind][:: max(1, len(steps[kind]) // MOST_STEPS)]],
        }
    return decoders


def _row(step: "StepCost") -> dict[str, float]:
    row = asdict(step) | {"ms": round(step.ms, 3)}
    del row["cpu_ms"]
    return row


def by_hand(path: str) -> dict[str, dict[str, Any]]:
    """Costs and traces from a file.

    Raises:
        UsageError: names what is missing.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            kind: {
                "cost": Cost.from_dict(given[kind]).as_dict(),
                "trace": Trace.from_dict(given[kind]).as_dict(),
            }
            for kind in KINDS
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--step-ms-json {path}: {error!r}; pass a JSON file as in benchmarks/README.md, with "
            '"d2f" and "ar"'
        ) from None


def build(decoders: dict[str, dict[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """The report: predictions by batch size and where they cross."""
    speeds = {}
    for kind, decoder in decoders.items():
        cost, trace = Cost.from_dict(decoder["cost"]), Trace.from_dict(decoder["trace"])
        speeds[kind] = [predict_steady(cost, trace, size) for size in SIZES]
        decoder["predicted"] = [
            {"batch_size": size, "tokens_per_s": float(f"{speed:.5g}")}
            for size, speed in zip(SIZES, speeds[kind], strict=True)
        ]
    report: dict[str, Any] = {"benchmark": "latency_model"}
    if len(speeds) == 2:
        costs = [Cost.from_dict(decoders[k]["cost"]) for k in KINDS]
        traces = [Trace.from_dict(decoders[k]["trace"]) for k in KINDS]
        report["predicted_speedup"] = {
            str(size): round(d / a, 3)
            for size, d, a in zip(SIZES, speeds["d2f"], speeds["ar"], strict=True)
        }
        report["ar_overtakes_at_batch"] = crossing(costs[0], traces[0], costs[1], traces[1])
    checks = [check for d in decoders.values() for check in d.get("checks", ())]
    if checks:
        report |= _checked_crossing(decoders)
        errors = [abs(check["error"]) for check in checks]
        report["prediction_error"] = {
            "mean": round(sum(errors) / len(errors), 3),
            "worst": round(max(errors), 3),
        }
    made_up = decoders.get("d2f", {}).get("simulated_tokens_per_forward")
    report["simulated_tokens_per_forward"] = made_up
    return {**report, **about, "units": UNITS, "decoders": decoders}


def _checked_crossing(decoders: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """D2F / AR of single batches and where it falls below 1, predicted and measured."""
    rows = []
    for d, a in zip(decoders["d2f"]["checks"], decoders["ar"]["checks"], strict=True):
        ratios = [x / y for x, y in zip(d["measured_runs"], a["measured_runs"], strict=True)]
        predicted = float(f"{d['predicted'] / a['predicted']:.4g}")
        measured = spread(ratios)
        rows.append({"batch_size": d["batch_size"], "predicted": predicted, "measured": measured})

    def first(name: str) -> int | None:
        ratio = {
            row["batch_size"]: row[name]["median"] if name == "measured" else row[name]
            for row in rows
        }
        return next((size for size in sorted(ratio) if ratio[size] < 1), None)

    crossing = {name: first(name) for name in ("predicted", "measured")}
    largest = max(row["batch_size"] for row in rows)
    return {"checked_ratio": rows, "checked_crossing": {**crossing, "largest_batch": largest}}


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of `benchmarks/results/latency_model.md`."""
    clock = {
        "wall": "Times are wall time.",
        "cpu": "Times are CPU time of the decoder's process: other programs were running.",
        "given": "Step times and tokens per forward were given by hand, nothing was measured.",
    }
    lines = ["# Step cost and what follows from it", "", *simulation_note(report)]
    lines += [f"`{report['command']}`", ""]
    if "hardware" in report:
        hardware = report["hardware"]
        lines += [f"{hardware['cpu']}, {hardware['threads']} thread(s) each.", ""]
    lines += [clock[report["clock"]], ""]
    for kind, d in report["decoders"].items():
        t = d["trace"]
        lines.append(
            f"- {kind}: step {Cost.from_dict(d['cost'])}; {t['tokens_per_forward']:.2f} tokens per "
            f"forward, window {t['window_tokens']:.1f}, answer {t['answer_tokens']:.1f}, prompt "
            f"{t['prompt_tokens']:.1f} tokens"
        )
    lines.append("")
    if "predicted_speedup" in report:
        at = report["ar_overtakes_at_batch"]
        where = "nowhere up to 4096" if at is None else f"at {at}"
        lines += [f"AR overtakes D2F {where} concurrent requests (predicted).", ""]
        lines += ["| concurrent requests | D2F tok/s | AR tok/s | D2F / AR |", "|---|---|---|---|"]
        rows = zip(*(report["decoders"][kind]["predicted"] for kind in KINDS), strict=True)
        for d, a in rows:
            ratio = report["predicted_speedup"][str(d["batch_size"])]
            lines.append(
                f"| {d['batch_size']} | {d['tokens_per_s']:.0f} | {a['tokens_per_s']:.0f} | "
                f"{ratio:.2f} |"
            )
        lines.append("")
    if "prediction_error" in report:
        error = report["prediction_error"]
        lines += [
            "Checked on other problems than the fit has seen, one batch at a time.",
            *_crossing_lines(report),
            f"Off by {error['mean']:.1%} on average, {error['worst']:.1%} at worst.",
            "",
            "| decoder | batch | predicted tok/s | measured tok/s | error |",
            "|---|---|---|---|---|",
        ]
        for kind, d in report["decoders"].items():
            for c in d["checks"]:
                lines.append(
                    f"| {kind} | {c['batch_size']} | {c['predicted']:.0f} | {c['measured']:.0f} | "
                    f"{c['error']:+.1%} |"
                )
    return "\n".join(lines)


def _crossing_lines(report: Mapping[str, Any]) -> list[str]:
    """The checked ratios as a table; none in results of before they were checked."""
    if "checked_ratio" not in report:
        return []
    found = report["checked_crossing"]

    def where(name: str) -> str:
        size = found[name]
        return f"at {size}" if size else f"nowhere up to {found['largest_batch']}"

    return [
        f"In such batches AR overtakes D2F {where('measured')}, predicted {where('predicted')}.",
        "",
        "| batch | D2F / AR predicted | D2F / AR measured (runs) |",
        "|---|---|---|",
        *[
            f"| {row['batch_size']} | {row['predicted']:.2f} | {row['measured']['median']:.2f} "
            f"({row['measured']['min']:.2f} to {row['measured']['max']:.2f}) |"
            for row in report["checked_ratio"]
        ],
        "",
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--d2f", default="d2f-tiny", help="D2F model: embedded name, folder or Hub id")
    add("--ar", default="ar-tiny", help="autoregressive model")
    add("--batch-sizes", type=int, nargs="+", default=[2**i for i in range(9)])
    add("--runs", type=int, default=3)
    add("--prompts", type=int, default=32, help="prompts per run and batch size, at least")
    add("--max-tokens", type=int, default=64)
    add("--token-budget", type=int, default=8192, help="vLLM's max_num_batched_tokens")
    add(
        "--mode",
        choices=("eager", "compiled"),
        help="of vLLM (default: eager, on a GPU compiled, which is vLLM's own default)",
    )
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time, for a CPU that other programs share (never for a GPU)",
    )
    add("--data", help='JSONL with "question" and "answer" (default: generated problems)')
    add("--step-ms-json", metavar="FILE", help="costs and traces by hand; nothing is measured")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for both vLLM engines")
    add("--seed", type=int, default=0, help="of the generated problems")
    add("--quick", action="store_true", help="a small measurement, under a minute")
    add("--json", help="write the result here, with a .md and two .png beside it")
    args = parser.parse_args(argv)
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    if min([*args.batch_sizes, args.runs, args.prompts, args.max_tokens]) < 1:
        parser.error("--batch-sizes, --runs, --prompts and --max-tokens must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    about = environment(args.seed, given, "benchmarks.latency_model")
    try:
        decoders = by_hand(args.step_ms_json) if args.step_ms_json else _measured(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: a decoder failed: {error}", file=sys.stderr)
        return 1
    clock = "given" if args.step_ms_json else args.clock
    report = build(decoders, {"clock": clock, **about})
    write_result(report, markdown(report), args.json)
    if args.json:
        from benchmarks.plots import forward_cost, prediction

        path = Path(args.json)
        prediction(report, path.with_suffix(".png"))
        if not args.step_ms_json:
            forward_cost(report, path.with_name(path.stem + "_forward_cost.png"))
    return 0


def _measured(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    prepare_process()
    models = {"d2f": resolve_model("--d2f", args.d2f), "ar": resolve_model("--ar", args.ar)}
    given = parse_options("--engine-args", args.engine_args)
    # Read before a model is loaded, which takes longer than to find that there are too few.
    load_items(2 * max(*args.batch_sizes, args.prompts), args.data, args.seed)
    options = device_share(len(models), {"max_num_batched_tokens": args.token_budget, **given})
    args.mode = args.mode or most_modes()[0]
    workers: dict[str, Worker] = {}
    try:
        for kind, model in models.items():
            workers[kind] = Worker(
                "engine",
                model=model,
                mode=args.mode,
                max_batch=max(args.batch_sizes),
                max_tokens=args.max_tokens,
                options=options,
            )
            if on_gpu():  # each measures how much memory is free
                workers[kind].wait()
        # Both are loaded before either is measured: loading would take the other's cores.
        for worker in workers.values():
            worker.wait()
        return measure(workers, args)
    finally:
        close_all(list(workers.values()))


if __name__ == "__main__":
    sys.exit(main())
