# SPDX-License-Identifier: Apache-2.0
"""Times of repeated calls, spreads over runs, and what the machine can do at best.

On a GPU calls are queued behind a kernel that waits, so that the host is ahead and what lies
between two events is the device's work alone. Inputs rotate where they would stay in the level 2
cache.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

L2_BYTES = 64 << 20
"""At least the level 2 cache of the devices that were measured (50 MB)."""
QUEUE = 8
"""Calls between two events."""
WAIT_CYCLES = 4_000_000
"""About 2 ms, in which the host queues the calls."""

Run = Callable[[], Any]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def rounded(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, lowest and highest value."""
    values = list(values)
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: rounded(value) for name, value in found.items()}


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Return the 50th and 99th percentile (nearest rank)."""
    ordered = sorted(values)
    at = {f"p{percent}": math.ceil(percent / 100 * len(ordered)) - 1 for percent in (50, 99)}
    return {name: rounded(ordered[index]) for name, index in at.items()}


def copies(bytes_: int, device: torch.device, most: int = 8) -> int:
    """Return how many sets of inputs of this size keep a GPU's cache cold; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    return max(1, min(most, -(-4 * L2_BYTES // max(bytes_, 1))))


def once(turn: Iterator[Run], device: torch.device, clock: str = "wall") -> tuple[float, float]:
    """Return the milliseconds of one call, on a device if there is one, and of queueing it."""
    timer = CLOCKS[clock]
    if device.type != "cuda":
        started = timer()
        next(turn)()
        return (ms := 1e3 * (timer() - started)), ms
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(WAIT_CYCLES)
    begin.record()
    started = time.perf_counter()
    for _ in range(QUEUE):
        next(turn)()
    host_ms = 1e3 * (time.perf_counter() - started) / QUEUE
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / QUEUE, host_ms


def measure(
    runs: Mapping[str, Sequence[Run]],
    device: torch.device,
    repeats: int = 15,
    warm_up: int = 3,
    clock: str = "wall",
) -> dict[str, dict[str, float]]:
    """Return times of one call of each, by name: `ms` the median, `ms_min`, `host_us` to queue it.

    Of a name there are several calls on different inputs, which take turns. All are interleaved, so
    that what else runs on the machine hits them alike.
    """
    turns = {name: itertools.cycle(calls) for name, calls in runs.items()}
    for name, turn in turns.items():
        for _ in range(max(warm_up, len(runs[name]))):
            next(turn)()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, turn in turns.items():
            taken[name].append(once(turn, device, clock))
    found = {}
    for name, times in taken.items():
        ms, host_ms = zip(*times, strict=True)
        host_us = round(1e3 * statistics.median(host_ms), 1)
        median, least = round(statistics.median(ms), 5), round(min(ms), 5)
        found[name] = {"ms": median, "ms_min": least, "host_us": host_us}
    return found


def machine(device: torch.device, dtype: torch.dtype, clock: str = "wall") -> dict[str, float]:
    """Measure copy bandwidth and the speed of a large matrix product, the faster of two tries."""
    cpu = device.type == "cpu"
    source = torch.empty(1 << (26 if cpu else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 1024 if cpu else 8192
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    runs = {"copy": [lambda: target.copy_(source)], "product": [lambda: left @ right]}
    twice = [measure(runs, device, 10, clock=clock) for _ in range(2)]
    best = {name: min(found[name]["ms_min"] for found in twice) for name in runs}
    return {
        "copy_gb_per_s": round(2 * source.numel() / best["copy"] / 1e6, 2),
        "matmul_gflop_per_s": round(2 * side**3 / best["product"] / 1e6, 1),
    }
