# SPDX-License-Identifier: Apache-2.0
"""The cost model: what a step costs, what a request asks of the engine, and the speed that follows.

Pure functions. `floor` bounds a step from below by the bytes and operations that it cannot avoid,
at the bandwidth and speed measured on the machine; `Cost` is fitted to measured steps; `Projected`
carries measured steps over to another machine or shape.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchmarks.harness import shapes
from benchmarks.harness.record import UsageError

if TYPE_CHECKING:
    from benchmarks.harness.engine import Batch, StepCost

MOST_REQUESTS = 4096
"""The most requests that `crossing` tries."""


class StepTime(Protocol):
    """A model of the milliseconds that a step takes."""

    def ms(self, tokens: float, context: float, new: float = 0) -> float:
        """Return the cost of one step in which `new` requests enter."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of a step: a + b * tokens + c * context + d * requests that enter.

    `points`, pairs of tokens and milliseconds, take the place of a and b where they are given:
    between points the cost is a straight line, before the first one it is the first one's, behind
    the last one the last line continues.
    """

    a_ms: float = 0.0
    b_ms_per_token: float = 0.0
    c_ms_per_context_token: float = 0.0
    d_ms_per_request: float = 0.0
    points: tuple[tuple[float, float], ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cost":
        """Make a cost of what a report holds."""
        points = values.get("points", ())
        return cls(**{**values, "points": tuple((t, ms) for t, ms in points)})

    def ms(self, tokens: float, context: float, new: float = 0) -> float:
        """Return the cost of one step in which `new` requests enter."""
        beside = self.c_ms_per_context_token * context + self.d_ms_per_request * new
        return self._tokens_ms(tokens) + beside

    def _tokens_ms(self, tokens: float) -> float:
        if not self.points:
            return self.a_ms + self.b_ms_per_token * tokens
        (t0, ms0), (t1, ms1) = self.points[-2:]
        if tokens > t1:
            return ms1 + (ms1 - ms0) / (t1 - t0) * (tokens - t1)
        return float(np.interp(tokens, *np.array(self.points).T))

    def relative_error(self, steps: "Sequence[StepCost]") -> dict[str, float]:
        """Return the median and 90th percentile of |predicted / measured - 1| over the steps."""
        errors = [abs(self.ms(s.tokens, s.context, s.new) / s.ms - 1) for s in steps]
        median, p90 = (round(float(np.quantile(errors, q)), 4) for q in (0.5, 0.9))
        return {"median": median, "p90": p90}

    def __str__(self) -> str:
        if self.points:
            return "by points, " + ", ".join(f"{t:.0f}: {ms:g} ms" for t, ms in self.points)
        return (
            f"{self.a_ms:.2f} ms + {1e3 * self.b_ms_per_token:.1f} us per token + "
            f"{1e3 * self.c_ms_per_context_token:.2f} us per context token + "
            f"{self.d_ms_per_request:.2f} ms per new request"
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """What a request asks of the engine, whatever else is in the batch."""

    tokens_per_forward: float  # useful ones; 1 for an autoregressive model
    window_tokens: float  # what it puts into a forward, beside its prompt; 1 for such a model
    answer_tokens: float
    prompt_tokens: float

    @classmethod
    def mean(cls, traces: "Sequence[Trace]") -> "Trace":
        """Return the mean of many requests, as totals divided by totals."""
        forwards, count = sum(t.forwards for t in traces), len(traces)
        answer, prompt = (
            sum(getattr(t, name) for t in traces) for name in ("answer_tokens", "prompt_tokens")
        )
        window = sum(t.window_tokens * t.forwards for t in traces)
        return cls(answer / forwards, window / forwards, answer / count, prompt / count)

    @property
    def forwards(self) -> float:
        return self.answer_tokens / self.tokens_per_forward

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def traces_of(batches: "Sequence[Batch]") -> list[Trace]:
    """Return one trace per answer."""
    return [
        Trace(a.useful / a.forwards, a.computed / a.forwards, a.useful, a.prompt)
        for batch in batches
        for a in batch.answers
    ]


def floor(bytes_: float, flops: float, machine: Mapping[str, float]) -> tuple[float, str]:
    """Return the least milliseconds for so many bytes and operations, and which of them decides.

    The machine is one of `timing.machine`.
    """
    by_bytes, by_flops = bytes_ / machine["copy_gb_per_s"], flops / machine["matmul_gflop_per_s"]
    return max((by_bytes / 1e6, "bytes"), (by_flops / 1e6, "flops"))


def step_floor_ms(shape: str, tokens: float, context: float, machine: Mapping[str, float]) -> float:
    """Return the least time of a step in bfloat16.

    It reads weights and `context` cached keys once, or makes two operations per weight and token,
    whichever takes longer.
    """
    weights = shapes.weight_bytes(shape)["step"]
    bytes_ = weights + shapes.kv_bytes_per_token(shape) * context
    return floor(bytes_, weights * tokens, machine)[0]


@dataclass(frozen=True, slots=True)
class Projected:
    """Milliseconds of a step of a shape on GPUs that share it by tensor parallelism.

    That is its floor at what steps `reached`, what measured steps took `beyond` (pairs of tokens
    and milliseconds), and two all-reduces in each layer, of `reduce_us` and their bytes.
    """

    shape: str
    reached: Mapping[str, float]
    beyond: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    gpus: int = 1
    reduce_us: float = 0.0
    reduce_gb_per_s: float = math.inf

    def ms(self, tokens: float, context: float, new: float = 0) -> float:
        """Return the cost of one step; requests that enter cost no more than their tokens."""
        step = step_floor_ms(self.shape, tokens, context, self.reached) / self.gpus
        step += float(np.interp(tokens, *np.array(self.beyond).T))
        if self.gpus == 1:
            return step
        of = shapes.sizes(self.shape)
        # A ring sends each byte twice, except for the share that the device has itself.
        sent = 2 * (1 - 1 / self.gpus) * tokens * 2 * of.hidden
        return step + 2 * of.layers * (self.reduce_us / 1e3 + sent / self.reduce_gb_per_s / 1e6)


def reached(
    ar: Iterable[Mapping[str, Any]],
    d2f: Iterable[Mapping[str, Any]],
    shape: str,
    machine: Mapping[str, float],
) -> dict[str, float]:
    """Find the bandwidth and arithmetic at which steps would take what was measured.

    The first is that of autoregressive steps, which read weights; the second that of the D2F step
    with the most tokens, which multiplies.
    """

    def times_floor(point: Mapping[str, Any]) -> float:
        floor_ms = step_floor_ms(shape, point["tokens"], point["context_tokens"], machine)
        return float(point["ms"]) / floor_ms

    return {
        "copy_gb_per_s": machine["copy_gb_per_s"] / statistics.median(map(times_floor, ar)),
        "matmul_gflop_per_s": machine["matmul_gflop_per_s"]
        / times_floor(max(d2f, key=lambda point: point["tokens"])),
    }


def beyond(
    points: Iterable[Mapping[str, Any]], shape: str, reached: Mapping[str, float]
) -> tuple[tuple[float, float], ...]:
    """Return, by tokens, how many milliseconds measured steps exceed their floor at `reached`."""
    found: dict[float, float] = {}
    for p in points:
        floor_ms = step_floor_ms(shape, p["tokens"], p["context_tokens"], reached)
        found[float(p["tokens"])] = p["ms"] - floor_ms
    return tuple((tokens, max(0.0, ms)) for tokens, ms in sorted(found.items()))


def read_steps(option: str, path: str) -> dict[str, Any]:
    """Read a result of `benchmarks.steps`."""
    try:
        report: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        report["points"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{option} {path}: {error!r}; pass a result of benchmarks.steps") from None
    return report


def steps_of(points: Mapping[str, Any], shape: str) -> list[dict[str, Any]]:
    """Return a result's measured steps of a shape."""
    return [point for key, point in points.items() if key.startswith(f"{shape}/steps/")]


def speeds_of(points: Mapping[str, Any], shape: str, rate: float) -> dict[int, dict[str, Any]]:
    """Return a result's measured batches of a shape at a simulated rate of tokens, by size."""
    prefix = f"{shape}/speed/{rate:g}/"
    keys = (key for key in points if key.startswith(prefix))
    found = {int(key.removeprefix(prefix)): points[key] for key in keys}
    return dict(sorted(found.items()))


def simulated_trace(speed: Mapping[str, Any]) -> Trace:
    """Return what each request of such a batch asked of the engine."""
    one = {"tokens_per_forward": 1.0, "window_tokens": 1.0, **speed}
    return Trace(**{name: one[name] for name in Trace.__slots__})


def fit(steps: "Sequence[StepCost]", knots: bool = False) -> Cost:
    """Fit by least squares of relative errors. Outliers weigh less: a busy machine has slow steps.

    With `knots` the cost of tokens is a line with knots at powers of two, never falling: a GPU's
    steps cost the same until it runs out of arithmetic. Else it is a straight line.
    """
    new, tokens, context, ms = (
        np.array([getattr(s, name) for s in steps], dtype=float)
        for name in ("new", "tokens", "context", "ms")
    )
    low, high = math.floor(math.log2(tokens.min())), math.ceil(math.log2(tokens.max()))
    at_T = np.array([2.0**k for k in range(min(low, high - 1), high + 1)])
    # The part of a step in each interval between knots. The first column is the first knot's cost.
    stretches = np.clip(tokens[:, None] - at_T[:-1], 0, np.diff(at_T))
    columns = np.column_stack([np.ones_like(ms), stretches if knots else tokens, context, new])
    weight = 1 / ms
    solution = np.zeros(columns.shape[1])
    for _ in range(10):
        solution = _positive_least_squares(columns * weight[:, None], ms * weight)
        error = np.abs(columns @ solution / ms - 1)
        # Huber: beyond the usual error a step counts in proportion to its distance, not squared.
        usual = max(2 * float(np.median(error)), 1e-6)
        weight = np.sqrt(np.minimum(1, usual / np.maximum(error, 1e-9))) / ms
    first, *slopes, c, d = (float(f"{value:.6g}") for value in solution)
    if not knots:
        return Cost(first, slopes[0], c, d)
    at_knots = first + np.concatenate([[0], np.cumsum(solution[1:-2] * np.diff(at_T))])
    points = tuple((float(t), float(f"{ms:.6g}")) for t, ms in zip(at_T, at_knots, strict=True))
    return Cost(0.0, 0.0, c, d, points)


def _positive_least_squares(rows: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Solve without the terms that come out negative, because no token makes a step cheaper."""
    keep = np.ones(rows.shape[1], dtype=bool)
    while True:
        solution = np.zeros(rows.shape[1])
        solution[keep] = np.linalg.lstsq(rows[:, keep], goal, rcond=None)[0]
        if not (negative := solution < 0).any():
            return solution
        keep &= ~negative


def predict_steady(cost: StepTime, trace: Trace, requests: int) -> float:
    """Return useful tokens per second while there are always `requests` of them, all alike.

    Their prompts come in one by one, so each step carries its share of them.
    """
    tokens = requests * (trace.window_tokens + trace.prompt_tokens / trace.forwards)
    context = requests * (trace.prompt_tokens + trace.answer_tokens / 2)
    new = requests / trace.forwards
    return 1e3 * requests * trace.tokens_per_forward / cost.ms(tokens, context, new)


def predict_batch(cost: StepTime, traces: Sequence[Trace], size: int, budget: int) -> float:
    """Return useful tokens per second of batches that begin together and end with the last one.

    `traces` are dealt out in batches, and repeated to fill a batch larger than all of them. What is
    beyond the `budget` of a step's tokens goes into further steps.
    """
    useful = ms = 0.0
    count = max(1, len(traces) // size)
    for at in range(count):
        batch = [traces[(at * size + i) % len(traces)] for i in range(size)]
        useful += sum(t.answer_tokens for t in batch)
        for step in range(round(max(t.forwards for t in batch))):
            alive = [t for t in batch if round(t.forwards) > step]
            tokens = sum(t.window_tokens for t in alive)
            if step == 0:
                # An autoregressive model's first token comes out of the prompt itself.
                prompt = sum(t.prompt_tokens for t in batch)
                tokens = prompt + (tokens if tokens > size else 0)
            context = sum(t.prompt_tokens + step * t.tokens_per_forward for t in alive if step)
            parts = -(-tokens // budget)
            ms += cost.ms(tokens, context, 0 if step else size) + (parts - 1) * cost.ms(0, 0)
    return 1e3 * useful / ms


def crossing(d2f: Cost, d2f_trace: Trace, ar: Cost, ar_trace: Trace) -> int | None:
    """Return the fewest concurrent requests at which the autoregressive model is faster, if any."""
    for requests in range(1, MOST_REQUESTS + 1):
        if predict_steady(ar, ar_trace, requests) > predict_steady(d2f, d2f_trace, requests):
            return requests
    return None


def falls_below_1(ratios: Mapping[int, float]) -> float | None:
    """Return where a ratio over batch sizes falls below 1, on straight lines between logarithms."""
    for (a, high), (b, low) in itertools.pairwise(ratios.items()):
        if high >= 1 > low:
            share = math.log(high) / (math.log(high) - math.log(low))
            return float(f"{a * (b / a) ** share:.4g}")
    return None
