# SPDX-License-Identifier: Apache-2.0
"""From measured steps to the cost model of `benchmarks.latency_model`, and a check of it.

    python -m benchmarks.gpu.fit gpu-results/steps.json --json costs.json
    python -m benchmarks.latency_model --step-ms-json costs.json

A GPU's step costs the same until it runs out of arithmetic, so the cost of tokens is a line with
knots at powers of two, never falling; beside it go cached tokens and requests that enter. Fitted to
the steps of `steps.json` whose windows were all full, and checked on its `speed` points, which the
fit has not seen.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.costs import Cost, Trace, _positive_least_squares, predict_batch
from benchmarks.gpu.store import Mismatch, read

PAIRS = {"dream": "qwen", "llada": "llama"}
"""A D2F shape and the autoregressive one beside it."""
RATE = 2.9
BUDGET = 32768
"""Most tokens of a step in stage d."""


class NotEnough(Exception):
    """The points that a fit needs are not there; says which stage measures them."""


def rows(points: Mapping[str, Any], part: str) -> np.ndarray:
    """[requests, new, tokens, context, ms] of every kept step."""
    found = [
        row
        for key, point in points.items()
        if key.startswith(f"{part}/steps/")
        for row in [*point["entering"], *point["steps"]]
    ]
    if len({row[2] for row in found}) < 2:
        raise NotEnough(f"{part}: steps of at least two sizes; run the stage steps/{part}")
    # A step that enters twice in the file counts once.
    return np.array(sorted({tuple(row) for row in found}), dtype=float)


def fit(measured: np.ndarray) -> Cost:
    """Least squares of relative errors, outliers weighed down."""
    _, new, tokens, context, ms = measured.T
    low, high = math.floor(math.log2(tokens.min())), math.ceil(math.log2(tokens.max()))
    knots = np.array([2.0**k for k in range(low, high + 1)])
    if len(knots) < 2:
        knots = np.array([knots[0] / 2, knots[0]])
    # What a step has of each stretch between knots; the first column is the cost at the first knot.
    stretches = np.clip(tokens[:, None] - knots[:-1], 0, np.diff(knots))
    columns = np.column_stack([np.ones_like(ms), stretches, context, new])
    weight = 1 / ms
    for _ in range(10):
        solution = _positive_least_squares(columns * weight[:, None], ms * weight)
        error = np.abs(columns @ solution / ms - 1)
        usual = max(2 * float(np.median(error)), 1e-6)
        weight = np.sqrt(np.minimum(1, usual / np.maximum(error, 1e-9))) / ms
    at_knots = solution[0] + np.concatenate([[0], np.cumsum(solution[1:-2] * np.diff(knots))])
    points = tuple((float(t), float(f"{c:.6g}")) for t, c in zip(knots, at_knots, strict=True))
    per_context, per_new = (float(f"{value:.6g}") for value in solution[-2:])
    return Cost(0.0, 0.0, per_context, per_new, points)


def trace(points: Mapping[str, Any], part: str, rate: float) -> Trace:
    """What a request asks of the engine, from the speed point of one request."""
    key = f"{part}/speed/{rate:g}/1"
    if key not in points:
        raise NotEnough(f"{key}; run the stage steps/{part}")
    found = points[key]
    return Trace(
        found.get("tokens_per_forward", 1.0),
        found.get("window_tokens", 1.0),
        found["answer_tokens"],
        found["prompt_tokens"],
    )


def checks(
    points: Mapping[str, Any], part: str, rate: float, cost: Cost, one: Trace
) -> list[dict[str, float]]:
    """Predicted and measured tokens per second of single batches."""
    out = []
    for key, found in points.items():
        if key.startswith(f"{part}/speed/{rate:g}/"):
            size = int(key.rsplit("/", 1)[1])
            predicted = predict_batch(cost, [one], size, BUDGET)
            measured = found["tokens_per_s"]
            out.append(
                {
                    "batch_size": size,
                    "predicted": float(f"{predicted:.5g}"),
                    "measured": measured,
                    "error": round(predicted / measured - 1, 4),
                }
            )
    return sorted(out, key=lambda row: row["batch_size"])


def crossing(sizes: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Where a ratio over batch sizes falls below 1, on straight lines between logarithms."""
    pairs = list(zip(sizes, ratios, strict=True))
    for (a, high), (b, low) in zip(pairs, pairs[1:], strict=False):
        if high >= 1 > low:
            share = math.log(high) / (math.log(high) - math.log(low))
            return float(f"{a * (b / a) ** share:.4g}")
    return None


def analyse(points: Mapping[str, Any], d2f: str, rate: float = RATE) -> dict[str, Any]:
    """Costs and traces for `benchmarks.latency_model`, checks, and the crossing both ways.

    Raises:
        NotEnough: points are missing.
    """
    parts = {"d2f": (d2f, rate), "ar": (PAIRS[d2f], 1.0)}
    out: dict[str, Any] = {"rate": rate}
    for kind, (part, speed) in parts.items():
        cost, one = fit(rows(points, part)), trace(points, part, speed)
        out[kind] = {
            "shape": part,
            **cost.as_dict(),
            **one.as_dict(),
            "checks": checks(points, part, speed, cost, one),
        }
    by_size = [{c["batch_size"]: c for c in out[kind]["checks"]} for kind in ("d2f", "ar")]
    both = sorted(by_size[0].keys() & by_size[1].keys())
    for name in ("predicted", "measured"):
        ratios = [by_size[0][size][name] / by_size[1][size][name] for size in both]
        out[f"ratio_{name}"] = {
            str(size): round(ratio, 4) for size, ratio in zip(both, ratios, strict=True)
        }
        out[f"crossing_{name}"] = crossing(both, ratios)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", type=Path, help="steps.json of a run")
    parser.add_argument("--d2f", choices=list(PAIRS), default="dream")
    parser.add_argument("--rate", type=float, default=RATE, help="tokens per forward")
    parser.add_argument("--json", type=Path, help="for benchmarks.latency_model --step-ms-json")
    args = parser.parse_args(argv)
    try:
        found = analyse(read(args.steps)["points"], args.d2f, args.rate)
    except (OSError, Mismatch, NotEnough) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for kind in ("d2f", "ar"):
        print(f"{kind}: {Cost.from_dict(found[kind])}")
        for row in found[kind]["checks"]:
            print(f"  {row['batch_size']}: {row['measured']:.0f} tok/s, {row['error']:+.1%}")
    predicted, measured = found["crossing_predicted"], found["crossing_measured"]
    print(f"AR overtakes: predicted {predicted}, measured {measured}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
