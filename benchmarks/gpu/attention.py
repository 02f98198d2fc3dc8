# SPDX-License-Identifier: Apache-2.0
"""Stage a: block-causal attention alone, every variant against the device's floor.

A point is one case of one layer: contexts of 256 to 8192, 1 to 64 requests, 1 to 8 blocks of 16, 32
or 64. Each variant of `benchmarks.attention_variants` that the device can run is checked against
float64 and timed; a variant that is wrong or fails stands there with its error, the others go on.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.attention import TOLERANCE, bounds
from benchmarks.attention_problem import Case, Layer, Problem, Unavailable
from benchmarks.attention_variants import VARIANTS
from benchmarks.gpu.stage import Options, Points, Skip
from benchmarks.gpu.timing import copies, machine, measure

LAYERS = {"dream": Layer(28, 4, 128), "llada": Layer(32, 32, 128)}
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
REQUESTS = (1, 4, 16, 64)
BLOCKS = (1, 2, 4, 8)
BLOCK_SIZES = (32, 16, 64)
DENSE_BYTES = 4 << 30
"""Largest mask or score matrix of the variants that keep one."""
DENSE = ("sdpa", "sdpa_paged", "flex")


def cases(options: Options) -> list[Case]:
    """All cases; those of published settings come first, should time run out."""
    grid: tuple[tuple[int, ...], ...] = (CONTEXTS, REQUESTS, BLOCKS, BLOCK_SIZES)
    if options.rehearse:
        grid = ((64,), (2,), (1, 2), (16,))
    elif options.quick:
        grid = ((512, 4096), (1, 16), (1, 4), (32,))
    every = [Case(*values) for values in itertools.product(*grid)]
    return sorted(every, key=lambda c: (c.block_size != 32, c.requests not in (1, 16)))


def names(options: Options) -> list[str]:
    """Variants to try; compiling one for a CPU takes minutes and shows nothing."""
    return [name for name in VARIANTS if name != "flex" or not options.rehearse]


def points(part: str, options: Options) -> Points:
    device = torch.device(options.device)
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    layer = Layer(4, 2, 32) if options.rehearse else LAYERS[part]
    floor: dict[str, float] = {}

    def rates() -> dict[str, float]:
        floor.update(machine(device, dtype))
        return dict(floor)

    yield f"{part}/machine", rates
    for case in cases(options):
        key = f"{part}/{case.context}/{case.requests}/{case.blocks}x{case.block_size}"

        def row(case: Case = case) -> dict[str, Any]:
            if not floor:
                rates()
            return measure_case(case, layer, device, dtype, floor, names(options))

        yield key, row


def measure_case(
    case: Case,
    layer: Layer,
    device: torch.device,
    dtype: torch.dtype,
    rates: dict[str, float],
    variants: Sequence[str],
) -> dict[str, Any]:
    """The figures of every variant in one case."""
    first = Problem.make(case, layer, device, dtype, 0)
    row: dict[str, Any] = bounds(first, rates)
    problems = [first]
    for seed in range(1, copies(row["bytes"])):
        problems.append(Problem.make(case, layer, device, dtype, seed))
    figures: dict[str, Any] = {}
    scores = 4 * case.requests * layer.heads * case.window * (case.context + case.window)
    for name in variants:
        if name in DENSE and scores > DENSE_BYTES:
            figures[name] = {"unavailable": f"{scores >> 30} GiB of scores"}
            continue
        figures[name] = variant(VARIANTS[name], problems, TOLERANCE[dtype], row["floor_ms"])
    if all("ms" not in found for found in figures.values()):
        raise Skip(f"no variant runs here: {figures}")
    return {**row, "copies": len(problems), "variants": figures}


def variant(
    set_up: Callable[[Problem], Any], problems: list[Problem], tolerance: float, floor_ms: float
) -> dict[str, Any]:
    """One variant: figures, or why there are none.

    Raises:
        RuntimeError: the device itself failed; nothing that follows in this process can be trusted.
    """
    device = problems[0].query_THD.device
    try:
        runs = [set_up(problem) for problem in problems]
        error = problems[0].error(runs[0]())
        if not error <= tolerance:
            return {"wrong_by": error}
        timing = measure(runs, device)
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except torch.OutOfMemoryError as reason:
        return {"unavailable": str(reason).splitlines()[0]}
    except Exception as reason:
        if "CUDA error" in str(reason):
            raise
        return {"failed": f"{type(reason).__name__}: {str(reason)[:300]}"}
    times = {"times_floor": round(timing.ms / floor_ms, 3)}
    return {**timing.as_dict(), "max_error": error, **times}
