# SPDX-License-Identifier: Apache-2.0
"""Stage e: where a step's time goes on the device: the largest kernels, the gaps, the waits.

A few steps under torch's profiler, windows of 4 blocks all full. Gaps are times in which no kernel
ran between the first and the last one; waits are runtime calls in which the host stood still.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from benchmarks.gpu import shapes
from benchmarks.gpu.engine import BLOCK, DummyEngine
from benchmarks.gpu.stage import Options, Points, Skip
from benchmarks.gpu.steps import LASTING, _later, _warm_up

REQUESTS = (1, 16, 64)
STEPS = 5
TOP = 25
WAITS = ("Synchronize", "cudaMemcpy", "cudaStreamWaitEvent", "cudaFree", "cudaMalloc")


@dataclass(frozen=True, slots=True)
class Span:
    """One event of a trace; microseconds on the trace's clock."""

    name: str
    begin: float
    end: float
    on_device: bool


def points(part: str, options: Options) -> Points:
    engine = cache(lambda: DummyEngine(part, options))
    for count in (2,) if options.rehearse else REQUESTS:
        yield f"{part}/{count}", partial(_later, engine, profile, count, options)


def profile(engine: DummyEngine, requests: int, options: Options) -> dict[str, Any]:
    """Trace some steps with full windows."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    width = 4 * BLOCK if engine.diffusion else 1
    context = 48 if options.rehearse else 512
    if reason := engine.fits(requests, context + width + LASTING, requests * width):
        raise Skip(reason)
    if engine.diffusion:
        engine.simulate(1.0)
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with engine.running(requests, context, 4, width + LASTING) as run:
        engine.clock.start()
        _warm_up(engine, run, requests, width)
        at = len(engine.clock.steps)
        with trace(activities=kinds) as traced:
            for _ in range(STEPS):
                run()
        took = [step.ms for step in engine.clock.steps[at:]]
    spans = spans_of(traced.events())
    row = summary(spans, len(took) or 1)
    row["wall_ms_per_step"] = round(sum(took) / max(len(took), 1), 4)
    row["weights_gb"] = round(shapes.weight_bytes(engine.name)["step"] / 1e9, 3)
    if not any(span.on_device for span in spans):
        ops: dict[str, float] = defaultdict(float)
        for found in traced.key_averages():
            ops[found.key] += found.self_cpu_time_total
        row["top_cpu"] = _largest(ops, len(took) or 1)
    return row


def spans_of(events: Iterable[Any]) -> list[Span]:
    """A trace's events, without named ranges: the host's appear on the device too, over its
    kernels and gaps.
    """
    import torch

    return [
        Span(
            event.name,
            event.time_range.start,
            event.time_range.end,
            event.device_type == torch.autograd.DeviceType.CUDA,
        )
        for event in events
        if not event.is_user_annotation
    ]


def summary(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    """Per step: busy and idle device time, the largest kernels and gaps, the host's waits."""
    device = sorted((s for s in spans if s.on_device), key=lambda s: s.begin)
    kernels: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    gaps: dict[tuple[str, str], float] = defaultdict(float)
    busy = idle = 0.0
    until, before = (device[0].begin, "") if device else (0.0, "")
    for span in device:
        kernels[span.name] += span.end - span.begin
        counts[span.name] += 1
        if span.begin > until:
            idle += span.begin - until
            gaps[before, span.name] += span.begin - until
        # Streams overlap: what is covered already counts once.
        busy += max(0.0, span.end - max(span.begin, until))
        if span.end >= until:
            until, before = span.end, span.name
    waits: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        if not span.on_device and span.name.startswith("cuda") and _waits(span.name):
            waits[span.name].append(span.end - span.begin)
    return {
        "steps": steps,
        "device_busy_ms": round(busy / steps / 1e3, 4),
        "device_idle_ms": round(idle / steps / 1e3, 4),
        "kernels_per_step": round(len(device) / steps, 1),
        "top_kernels": _largest(kernels, steps, counts),
        "top_gaps": [
            {"after": a[:80], "before": b[:80], "ms_per_step": round(us / steps / 1e3, 4)}
            for (a, b), us in sorted(gaps.items(), key=lambda item: -item[1])[:10]
        ],
        "waits": {
            name: {
                "per_step": round(len(times) / steps, 2),
                "ms_per_step": round(sum(times) / steps / 1e3, 4),
            }
            for name, times in sorted(waits.items())
        },
    }


def _waits(name: str) -> bool:
    return any(part in name for part in WAITS)


def _largest(
    times: dict[str, float], steps: int, counts: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    total = sum(times.values()) or 1.0
    return [
        {
            "name": name[:160],
            "ms_per_step": round(us / steps / 1e3, 4),
            "share": round(us / total, 4),
            **({} if counts is None else {"per_step": round(counts[name] / steps, 2)}),
        }
        for name, us in sorted(times.items(), key=lambda item: -item[1])[:TOP]
    ]
