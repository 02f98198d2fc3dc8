# SPDX-License-Identifier: Apache-2.0
"""Time on the device, and what the device can do at best.

Calls are queued behind a kernel that waits, so that the host is ahead and what lies between two
events is the device's work alone. Inputs rotate where they would stay in the level 2 cache.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

L2_BYTES = 64 << 20
"""Not less than the level 2 cache of the devices at hand (50 MB)."""
QUEUE = 8
"""Calls between two events."""
WAIT_CYCLES = 4_000_000
"""About 2 ms, in which the host queues the calls."""

Run = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one call. `ms`: median on the device; `host_us`: what the host needs to queue it."""

    ms: float
    ms_min: float
    host_us: float

    def as_dict(self) -> dict[str, float]:
        return {
            "ms": round(self.ms, 5),
            "ms_min": round(self.ms_min, 5),
            "host_us": round(self.host_us, 1),
        }


def copies(bytes_: int, most: int = 8) -> int:
    """How many sets of inputs of this size keep the cache cold."""
    return max(1, min(most, -(-4 * L2_BYTES // max(bytes_, 1))))


def measure(
    runs: Sequence[Run], device: torch.device, repeats: int = 15, warm_up: int = 3
) -> Timing:
    """One call's time; `runs` do the same on different inputs and take turns."""
    turn = itertools.cycle(runs)
    for _ in range(max(warm_up, len(runs))):
        next(turn)()
    device_ms, host_us = [], []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(WAIT_CYCLES)
            begin.record()
            started = time.perf_counter()
            for _ in range(QUEUE):
                next(turn)()
            host_us.append(1e6 * (time.perf_counter() - started) / QUEUE)
            end.record()
            end.synchronize()
            device_ms.append(begin.elapsed_time(end) / QUEUE)
        else:
            started = time.perf_counter()
            next(turn)()
            device_ms.append(1e3 * (time.perf_counter() - started))
            host_us.append(1e3 * device_ms[-1])
    return Timing(statistics.median(device_ms), min(device_ms), statistics.median(host_us))


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth and speed of a large matrix product, the faster of two measurements."""
    small = device.type == "cpu"
    source = torch.empty(1 << (22 if small else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 256 if small else 8192
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    copy_ms = product_ms = float("inf")
    for _ in range(2):
        copy_ms = min(copy_ms, measure([lambda: target.copy_(source)], device).ms_min)
        product_ms = min(product_ms, measure([lambda: left @ right], device).ms_min)
    return {
        "copy_gb_per_s": round(2 * source.numel() / copy_ms / 1e6, 2),
        "matmul_gflop_per_s": round(2 * side**3 / product_ms / 1e6, 1),
    }
