# SPDX-License-Identifier: Apache-2.0
"""Block-causal attention alone: one layer's attention of a D2F step, computed in several ways.

    python -m benchmarks.attention            # every case, minutes
    python -m benchmarks.attention --quick    # a few, seconds

A case is a number of requests, each with a committed context and an open window of some blocks.
Every variant computes the same attention and is checked against a dense float64 reference. The
floor is what the machine could do at best: keys and values read once at the measured copy
bandwidth, or the products of the allowed pairs at the measured speed of a large matrix product,
whichever takes longer. Variants this machine cannot run are listed with the reason.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.attention_problem import Case, Layer, Problem, Unavailable
from benchmarks.attention_variants import VARIANTS
from benchmarks.workload import environment, write_result

CONTEXTS = (256, 512, 1024, 2048, 4096)
REQUESTS = (1, 4, 16)
BLOCKS = (1, 2, 4, 8)
BLOCK_SIZES = (16, 32)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
UNITS = {
    "ms": "milliseconds of one layer's attention, median",
    "ms_min": "the same, fastest repetition",
    "setup_ms": "milliseconds of index arithmetic, masks and plans, once per step",
    "max_error": "largest absolute difference from the float64 reference",
    "times_floor": "ms divided by floor_ms",
    "floor_ms": "milliseconds, see `floor`",
}


Timer = Callable[[], float]
CLOCKS: dict[str, Timer] = {"wall": time.perf_counter, "cpu": time.process_time}


def floor(
    device: torch.device, dtype: torch.dtype, timer: Timer = time.perf_counter
) -> dict[str, float]:
    """Copy bandwidth and speed of a large matrix product, best of several."""
    a = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    side = 1024 if device.type == "cpu" else 8192
    m = torch.randn(side, side, dtype=dtype, device=device)
    copy_s = min(clock(lambda: b.copy_(a), device, timer) for _ in range(10))
    product_s = min(clock(lambda: m @ m, device, timer) for _ in range(8))
    return {
        "copy_gb_per_s": round(2 * a.numel() / copy_s / 1e9, 2),
        "matmul_gflop_per_s": round(2 * side**3 / product_s / 1e9, 1),
    }


def clock(
    function: Callable[[], Any], device: torch.device, timer: Timer = time.perf_counter
) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = timer()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return timer() - started


def bounds(problem: Problem, machine: dict[str, float]) -> dict[str, Any]:
    """The least bytes and flops of a case, and the time they take on this machine."""
    case, layer = problem.case, problem.layer
    size = problem.query_THD.element_size()
    keys = case.requests * (case.context + case.window) * layer.kv_heads * layer.head_dim
    queries = case.requests * case.window * layer.heads * layer.head_dim
    bytes_ = size * (2 * keys + 2 * queries)
    pairs = sum(
        case.block_size * (case.context + block * case.block_size)
        for block in range(1, case.blocks + 1)
    )
    flops = 4 * layer.heads * layer.head_dim * pairs * case.requests
    times = {
        "bytes": bytes_ / machine["copy_gb_per_s"] / 1e6,
        "flops": flops / machine["matmul_gflop_per_s"] / 1e6,
    }
    bound = max(times, key=lambda name: times[name])
    return {"bytes": bytes_, "flops": flops, "floor_ms": times[bound], "bound": bound}


def measure(
    problem: Problem,
    names: Sequence[str],
    machine: dict[str, float],
    repeats: int,
    timer: Timer = time.perf_counter,
) -> tuple[dict[str, Any], dict[str, str]]:
    """One row of the result, and the variants that cannot run with their reasons."""
    device = problem.query_THD.device
    row = {**vars_of(problem.case), **bounds(problem, machine)}
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    setup: dict[str, float] = {}
    error: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            runs[name] = VARIANTS[name](problem)
            out_THD = runs[name]()
        except Unavailable as reason:
            runs.pop(name, None)
            skipped[name] = str(reason)
            continue
        error[name] = problem.error(out_THD)
        if not error[name] <= TOLERANCE[problem.query_THD.dtype]:
            raise AssertionError(f"{name} is wrong by {error[name]} in {problem.case}")
        setup[name] = min(clock(partial(VARIANTS[name], problem), device, timer) for _ in range(2))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):  # interleaved: what else runs on the machine hits all alike
        for name, run in runs.items():
            taken[name].append(1e3 * clock(run, device, timer))
    row["variants"] = {
        name: {
            "ms": round(statistics.median(times), 4),
            "ms_min": round(min(times), 4),
            "setup_ms": round(1e3 * setup[name], 4),
            "max_error": error[name],
            "times_floor": round(statistics.median(times) / row["floor_ms"], 2),
        }
        for name, times in taken.items()
    }
    row["floor_ms"] = round(row["floor_ms"], 5)
    return row, skipped


def vars_of(case: Case) -> dict[str, int]:
    return {name: getattr(case, name) for name in ("context", "requests", "blocks", "block_size")}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per variant: median distance from the floor, and median speed against virtual sequences."""
    names = dict.fromkeys(name for row in rows for name in row["variants"])
    table = {}
    for name in names:
        have = [row["variants"] for row in rows if name in row["variants"]]
        against = [v["virtual"]["ms"] / v[name]["ms"] for v in have if "virtual" in v]
        table[name] = {
            "cases": len(have),
            "median_times_floor": round(statistics.median(v[name]["times_floor"] for v in have), 2),
            "median_speed_vs_virtual": round(statistics.median(against), 3) if against else None,
            "fastest_in_cases": sum(min(v, key=lambda n: v[n]["ms"]) == name for v in have),
        }
    return table


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    names = list(report["summary"])
    machine = report["floor"]
    lines = [
        "# Block-causal attention, one layer",
        "",
        f"`{report['command']}` on {report['device']}, {report['hardware']['cpu']},",
        f"{report['hardware']['threads']} thread(s), {report['dtype']}; {report['layer']}.",
        *(
            ["Times are CPU time: other programs were running."]
            if report.get("clock") == "cpu"
            else []
        ),
        f"Measured here: copy {machine['copy_gb_per_s']} GB/s,",
        f"matrix product {machine['matmul_gflop_per_s']} GFLOP/s.",
        "All results agree with a float64 reference.",
        "",
        "| variant | cases | time / floor, median | speed against `virtual`, median | fastest in |",
        "|---|---|---|---|---|",
    ]
    for name, s in report["summary"].items():
        order = ("cases", "median_times_floor", "median_speed_vs_virtual", "fastest_in_cases")
        lines.append(f"| {name} | " + " | ".join(str(s[key]) for key in order) + " |")
    lines += ["", *(f"- `{n}` not run: {why}" for n, why in report["skipped"].items()), ""]
    lines += [
        "Milliseconds, median of one call (set-up excluded):",
        "",
        "| context | requests | blocks | floor (bound) | " + " | ".join(names) + " |",
        "|" + "---|" * (4 + len(names)),
    ]
    for row in report["rows"]:
        cells = [f"{row['variants'][n]['ms']:.3f}" if n in row["variants"] else "" for n in names]
        lines.append(
            f"| {row['context']} | {row['requests']} | {row['blocks']} x {row['block_size']} "
            f"| {row['floor_ms']:.3f} ({row['bound']}) | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--layer", help="query heads, key heads and head size, e.g. 28,4,128")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--requests", type=int, nargs="+", default=list(REQUESTS))
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--block-sizes", type=int, nargs="+", default=list(BLOCK_SIZES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: CPU time, for a CPU that other programs share (never for a GPU)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="two cases, without compiling anything"
    )
    parser.add_argument("--json", help="write the result here, and a Markdown table beside it")
    args = parser.parse_args(argv)
    if args.quick:
        args.contexts, args.requests, args.blocks = [256, 512], [2], [3]
        args.block_sizes, args.repeats = [16], 3
        args.variants = [name for name in args.variants if name != "flex"]
    if args.clock == "cpu" and args.device.startswith("cuda"):
        parser.error("--clock cpu measures nothing of what runs on a GPU: leave it out")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no CUDA device here, pass --device cpu")
    sizes = (*args.contexts, *args.requests, *args.blocks, *args.block_sizes, args.repeats)
    if min(sizes) < 1:
        parser.error(
            "--contexts, --requests, --blocks, --block-sizes and --repeats must be at least 1"
        )
    try:
        args.heads = [int(part) for part in args.layer.split(",")] if args.layer else None
        if args.heads and (min(args.heads) < 1 or args.heads[0] % args.heads[1]):
            raise ValueError
        if args.heads and len(args.heads) != 3:
            raise ValueError
    except (ValueError, IndexError):
        parser.error(
            f"--layer {args.layer}: pass query heads, key heads and head size, such as 28,4,128; "
            "query heads are a multiple of key heads"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tqdm import tqdm

    device = torch.device(args.device)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    layer = Layer(*(args.heads or ([28, 4, 128] if gpu else [8, 2, 64])))
    timer = CLOCKS[args.clock]
    machine = floor(device, dtype, timer)
    machine = {k: max(v, machine[k]) for k, v in floor(device, dtype, timer).items()}
    skipped: dict[str, str] = {}
    rows = []
    cases = [
        Case(*values)
        for values in itertools.product(args.contexts, args.requests, args.blocks, args.block_sizes)
    ]
    for case in tqdm(cases, desc="attention", disable=None):
        problem = Problem.make(case, layer, device, dtype, args.seed)
        names = [name for name in args.variants if name not in skipped]
        row, missing = measure(problem, names, machine, args.repeats, timer)
        skipped |= missing
        rows.append(row)
    arguments = sys.argv[1:] if argv is None else argv
    report = {
        **environment(args.seed, arguments, "benchmarks.attention"),
        "device": device.type,
        "clock": args.clock,
        "dtype": str(dtype).removeprefix("torch."),
        "layer": f"{layer.heads} query heads, {layer.kv_heads} key heads of {layer.head_dim}",
        "units": UNITS,
        "floor": machine,
        "summary": summary(rows),
        "skipped": skipped,
        "rows": rows,
    }
    write_result(report, markdown(report), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
