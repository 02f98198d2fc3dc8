# SPDX-License-Identifier: Apache-2.0
"""Block-causal attention alone: one layer's attention of a D2F step, computed in several ways.

    python -m benchmarks.attention            # every case, minutes
    python -m benchmarks.attention --quick    # a few, seconds

A case is a number of requests, each with a committed context and an open window of some blocks.
Every variant is checked against a dense float64 reference; one that is wrong or fails is listed
with its error, and the exit status is 1. The floor: keys and values read once at the measured copy
bandwidth, or the products of the allowed pairs at the speed of a large matrix product.

Shape suffixes: R requests, T = R * W query tokens, W window positions, L context + window, H query
heads, K key heads, D head size, S block sequences, P pages of B positions.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import record, timing
from benchmarks.harness.cost import floor
from benchmarks.harness.record import Record, Skip
from vllm_d2f.blocks import BlockSequences, block_sequences, may_attend

LAYERS = {"dream": "28,4,128", "llada": "32,32,128"}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
PAGE = 32
DENSE_BYTES = 4 << 30
"""Largest mask or score matrix of the variants that keep one."""
DENSE, UNPAGED = ("sdpa", "sdpa_paged"), ("sdpa",)
"""Variants with a dense mask, and variants whose keys are contiguous, which no server has."""
UNITS = {
    "ms": "milliseconds of one layer's attention, median",
    "ms_min": "the same, fastest repetition",
    "host_us": "microseconds that the host needs to queue it",
    "setup_ms": "milliseconds of index arithmetic, masks and plans, once per step",
    "max_error": "largest absolute difference from the float64 reference",
    "times_floor": "ms divided by floor_ms",
    "floor_ms": "milliseconds, see `floor`",
}


# The problem.


class Unavailable(Exception):
    """This machine cannot run the variant, and why."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Case:
    """`requests` of the same shape: a prompt of `context` positions, then open blocks."""

    context: int
    requests: int
    blocks: int
    block_size: int

    @property
    def window(self) -> int:
        return self.blocks * self.block_size


@dataclass(frozen=True)
class Problem:
    """A case with its tensors. Pages of the cache lie in random order, as in a server."""

    case: Case
    layer: Layer
    query_THD: Tensor
    key_RLKD: Tensor
    value_RLKD: Tensor
    pages_RP: Tensor

    @classmethod
    def make(
        cls, case: Case, layer: Layer, device: torch.device, dtype: torch.dtype, seed: int
    ) -> "Problem":
        # Drawn on the device: a large cache would take longer to copy than to measure.
        generator = torch.Generator(device).manual_seed(seed)
        length = case.context + case.window
        pages = -(-length // PAGE)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        order = torch.randperm(case.requests * pages, generator=generator, device=device)
        query = random(case.requests * case.window, layer.heads, layer.head_dim)
        shape = (case.requests, length, layer.kv_heads, layer.head_dim)
        key, value = random(*shape), random(*shape)
        return cls(case, layer, query, key, value, order.view(case.requests, pages).int())

    @property
    def length(self) -> int:
        return self.case.context + self.case.window

    def mask_WL(self) -> Tensor:
        """Return the attention rule for one request's window."""
        position_L = torch.arange(self.length, device=self.query_THD.device)
        context = self.case.context
        query_W1, key_1L = position_L[context:, None], position_L[None]
        return may_attend(query_W1, key_1L, context, self.case.block_size)

    def sequences(self) -> tuple[BlockSequences, Tensor]:
        """Return the window's blocks as sequences, and the page table of each."""
        start_R = np.full(self.case.requests, self.case.context)
        size_R = np.full(self.case.requests, self.case.block_size)
        found = block_sequences(start_R, start_R + self.case.window, start_R, size_R)
        request_S = torch.from_numpy(found.request_S).to(self.pages_RP.device)
        return found, self.pages_RP[request_S]

    # A server has its cache before the step. So it is made once, outside of a variant's set-up.

    @cached_property
    def paged(self) -> tuple[Tensor, Tensor]:
        """Keys and values on their pages: [pages, B, K, D]."""
        return self._paged(self.key_RLKD), self._paged(self.value_RLKD)

    def _paged(self, source_RLKD: Tensor) -> Tensor:
        requests, pages = self.pages_RP.shape
        padded = source_RLKD.new_zeros(requests, pages * PAGE, *source_RLKD.shape[2:])
        padded[:, : self.length] = source_RLKD
        out = torch.empty_like(padded).view(requests * pages, PAGE, *source_RLKD.shape[2:])
        out[self.pages_RP.flatten().long()] = padded.view_as(out)
        return out

    @cached_property
    def cpu_paged(self) -> tuple[Tensor, Tensor]:
        """The same in the layout of vLLM's CPU kernel, written by its own operation."""
        from vllm import _custom_ops as ops

        layer, dtype = self.layer, self.query_THD.dtype
        shape = (self.pages_RP.numel(), layer.kv_heads, 2 * PAGE, layer.head_dim)
        key_cache, value_cache = torch.zeros(shape, dtype=dtype).chunk(2, dim=2)
        position_L = torch.arange(self.length)
        slot_RL = self.pages_RP[:, position_L // PAGE].long() * PAGE + position_L % PAGE
        key, value = self.key_RLKD.flatten(0, 1), self.value_RLKD.flatten(0, 1)
        slots, isa = slot_RL.flatten(), cpu_isa(layer, dtype)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
        return key_cache, value_cache

    def error(self, out_THD: Tensor, most: int = 2) -> float:
        """Return the largest difference from dense attention in float64, of the first requests."""
        group, worst = self.layer.heads // self.layer.kv_heads, 0.0
        W, mask_WL = self.case.window, self.mask_WL()
        for row in range(min(most, self.case.requests)):
            query = self.query_THD[row * W : (row + 1) * W].double().transpose(0, 1)
            key, value = (
                x[row].double().transpose(0, 1).repeat_interleave(group, 0)
                for x in (self.key_RLKD, self.value_RLKD)
            )
            scores = query @ key.transpose(1, 2) / self.layer.head_dim**0.5
            want = scores.masked_fill(~mask_WL, float("-inf")).softmax(-1) @ value
            got = out_THD[row * W : (row + 1) * W].reshape(W, self.layer.heads, -1)
            off = float((got.double().transpose(0, 1) - want).abs().max())
            worst = off if not off <= worst else worst  # a NaN is the worst
        return worst


def cpu_isa(layer: Layer, dtype: torch.dtype) -> str:
    """Return the instruction set vLLM picks for its CPU kernel."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, PAGE, layer.head_dim)


# The variants. Each is set up once per step (index arithmetic, masks, plans) and returns what one
# layer runs.

Run = Callable[[], Tensor]


def virtual(problem: Problem) -> Run:
    """Return what the engine runs: one non-causal sequence per block on a paged kernel."""
    on_cpu = problem.query_THD.device.type == "cpu"
    return _block_sequences_cpu(problem) if on_cpu else _block_sequences_cuda(problem)


def _block_sequences_cpu(problem: Problem) -> Run:
    from vllm import _custom_ops as ops

    layer, query = problem.layer, problem.query_THD
    sequences, table_SP = problem.sequences()
    kv_len_S = torch.from_numpy(sequences.kv_len_S)
    start_S1 = torch.from_numpy(sequences.query_start_S1)
    batch: dict[str, Any] = dict(seq_lens=kv_len_S, query_start_loc=start_S1, causal=False)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(kv_len_S), num_heads=layer.heads, num_kv_heads=layer.kv_heads,
        head_dim=layer.head_dim, dtype=query.dtype, sliding_window_size=-1,
        isa=cpu_isa(layer, query.dtype), enable_kv_split=True, **batch,
    )  # fmt: skip
    (key_cache, value_cache), out = problem.cpu_paged, torch.empty_like(query)

    def run() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=out,
            scale=layer.head_dim**-0.5, alibi_slopes=None, sliding_window=-1, softcap=0.0,
            block_table=table_SP, scheduler_metadata=metadata, s_aux=None, **batch,
        )  # fmt: skip
        return out

    return run


def _block_sequences_cuda(problem: Problem) -> Run:
    try:
        import flashinfer
    except ImportError:
        raise Unavailable("flashinfer is not installed: pip install flashinfer-python") from None
    from vllm_d2f.attention.page_lists import PageLists

    layer, device = problem.layer, problem.query_THD.device
    sequences, table_SP = problem.sequences()
    pages = PageLists(PAGE, table_SP.numel(), device)
    lists = pages.build(sequences.query_start_S1, sequences.kv_len_S, table_SP)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD")
    wrapper.plan(
        qo_indptr=lists.query_start_S1, paged_kv_indptr=lists.page_start_S1,
        paged_kv_indices=lists.pages_N, paged_kv_last_page_len=lists.last_page_len_S,
        num_qo_heads=layer.heads, num_kv_heads=layer.kv_heads, head_dim_qk=layer.head_dim,
        page_size=PAGE, causal=False, q_data_type=problem.query_THD.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(problem.query_THD, problem.paged)


@cache
def _workspace(device: torch.device) -> Tensor:
    """Return the workspace that all wrappers share. They run one after another."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def sdpa(problem: Problem, paged: bool = False) -> Run:
    """Run PyTorch's fused attention with a dense mask; with `paged` gather the keys first."""
    mask_WL = problem.mask_WL()
    query_RWHD = problem.query_THD.unflatten(0, (problem.case.requests, problem.case.window))
    query_RHWD = query_RWHD.transpose(1, 2)
    together = [x.transpose(1, 2) for x in (problem.key_RLKD, problem.value_RLKD)]
    page = problem.pages_RP.flatten().long()

    def gather(pages: Tensor) -> Tensor:
        found = pages[page].view(len(problem.pages_RP), -1, *pages.shape[2:])
        return found[:, : problem.length].transpose(1, 2)

    def run() -> Tensor:
        key, value = map(gather, problem.paged) if paged else together
        out = scaled_dot_product_attention(
            query_RHWD, key, value, attn_mask=mask_WL, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    return run


VARIANTS: dict[str, Callable[[Problem], Run]] = {"virtual": virtual, "sdpa": sdpa}
VARIANTS["sdpa_paged"] = partial(sdpa, paged=True)
"""The one interface of all variants: set up for a problem, get what a layer runs."""


# What is measured.


def bounds(problem: Problem, machine: Mapping[str, float]) -> dict[str, Any]:
    """Return the least bytes and flops of a case, and the time they take on this machine."""
    case, layer = problem.case, problem.layer
    size = problem.query_THD.element_size()
    keys = case.requests * (case.context + case.window) * layer.kv_heads * layer.head_dim
    queries = case.requests * case.window * layer.heads * layer.head_dim
    ends = (case.context + block * case.block_size for block in range(1, case.blocks + 1))
    pairs = sum(case.block_size * end for end in ends)
    bytes_ = size * (2 * keys + 2 * queries)
    flops = 4 * layer.heads * layer.head_dim * pairs * case.requests
    floor_ms, bound = floor(bytes_, flops, machine)
    return {"bytes": bytes_, "flops": flops, "floor_ms": floor_ms, "bound": bound}


def measure(
    problem: Problem,
    names: Sequence[str],
    machine: Mapping[str, float],
    repeats: int,
    clock: str = "wall",
) -> dict[str, Any]:
    """Return one row of the result: the figures of each variant, or the reason for having none."""
    case, layer, device = problem.case, problem.layer, problem.query_THD.device
    row, dtype = asdict(case) | bounds(problem, machine), problem.query_THD.dtype
    seeds = range(1, timing.copies(row["bytes"], device))
    problems = [problem, *(Problem.make(case, layer, device, dtype, seed) for seed in seeds)]
    scores = 4 * case.requests * layer.heads * case.window * problem.length
    runs: dict[str, list[timing.Run]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in DENSE and scores > DENSE_BYTES:
            found[name] = {"unavailable": f"{scores >> 30} GiB of scores"}
            continue
        try:
            again = itertools.cycle([partial(VARIANTS[name], problem)])
            calls: list[timing.Run] = [VARIANTS[name](one) for one in problems]
            error = problem.error(calls[0]())
            # The better of two, as a repeated step would pay.
            setup = min(timing.once(again, torch.device("cpu"), clock)[0] for _ in range(2))
            if error <= TOLERANCE[dtype]:
                runs[name] = calls
                found[name] = {"max_error": error, "setup_ms": round(setup, 4)}
            else:
                found[name] = {"wrong_by": error}
        except (Unavailable, torch.OutOfMemoryError) as reason:
            found[name] = {"unavailable": str(reason).splitlines()[0]}
        except Exception as reason:
            if "CUDA error" in str(reason):
                raise  # this process may be damaged
            found[name] = {"failed": f"{type(reason).__name__}: {str(reason)[:300]}"}
    for name, times in timing.measure(runs, device, repeats, clock=clock).items():
        ratio = round(times["ms"] / row["floor_ms"], 2)
        found[name] = {**times, **found[name], "times_floor": ratio}
    row["floor_ms"] = round(row["floor_ms"], 5)
    return {**row, "variants": found}


def timed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variants of a row that have a time."""
    return {name: found for name, found in row["variants"].items() if "ms" in found}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each variant its distance from the floor, its speed against `virtual`, and the
    cases in which it is fastest."""
    table = {}
    for name in dict.fromkeys(name for row in rows for name in timed(row)):
        have = [timed(row) for row in rows if name in timed(row)]
        against = [v["virtual"]["ms"] / v[name]["ms"] for v in have if "virtual" in v]
        times_floor = statistics.median(v[name]["times_floor"] for v in have)
        table[name] = {
            "cases": len(have),
            "median_times_floor": round(times_floor, 2),
            "median_speed_vs_virtual": round(statistics.median(against), 3) if against else None,
            "fastest_in_cases": sum(min(v, key=lambda n: v[n]["ms"]) == name for v in have),
        }
    return table


def best(row: Mapping[str, Any]) -> str | None:
    """Return the fastest variant that reads pages, as a server must."""
    have = {name: found for name, found in timed(row).items() if name not in UNPAGED}
    return min(have, key=lambda name: have[name]["ms"], default=None)


def worst_ratio(rows: Sequence[Mapping[str, Any]], requests: int) -> float | None:
    """Return the best variant's time over the floor, in the worst case of so many requests."""
    ratios = [
        row["variants"][name]["times_floor"]
        for row in rows
        if row["requests"] == requests and (name := best(row))
    ]
    return max(ratios, default=None)


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return the report as tables."""
    names, rows, machine = list(report["summary"]), report["rows"], report["floor"]
    return [
        *record.head("Block-causal attention, one layer", report),
        f"On {report['device']}, {report['dtype']}; {report['layer']}.",
        *["Times are CPU time: other programs were running."] * (report["clock"] == "cpu"),
        f"Measured here: copy {machine['copy_gb_per_s']} GB/s,",
        f"matrix product {machine['matmul_gflop_per_s']} GFLOP/s.",
        "All results agree with a float64 reference.",
        "",
        *record.columns(
            "variant cases median_times_floor median_speed_vs_virtual fastest_in_cases",
            ({"variant": name, **found} for name, found in report["summary"].items()),
        ),
        *(f"- `{name}` not run: {why}" for name, why in report["skipped"].items()),
        "",
        *record.bars(
            (f"best variant / floor, {n} request(s), worst case", worst_ratio(rows, n), "at most",
             1.5)
            for n in (1, 16) * (report["device"] != "cpu")
        ),
        "Milliseconds, median of one call (set-up excluded):",
        "",
        *record.table(
            ("context", "requests", "blocks", "floor (bound)", *names),
            (
                (row["context"], row["requests"], f"{row['blocks']} x {row['block_size']}",
                 f"{row['floor_ms']:.3f} ({row['bound']})",
                 *(f"{timed(row)[n]['ms']:.3f}" if n in timed(row) else "" for n in names))
                for row in rows
            ),
        ),
    ]  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("attention", __doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"))
    add("--layer", help=f"query heads, key heads and head size, e.g. 28,4,128, or {[*LAYERS]}")
    add("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    add("--requests", type=int, nargs="+", default=[1, 4, 16])
    add("--blocks", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--block-sizes", type=int, nargs="+", default=[16, 32])
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--repeats", type=int, default=7)
    help = "cpu: CPU time, for a CPU that other programs share (never for a GPU)"
    add("--clock", choices=list(timing.CLOCKS), default="wall", help=help)
    few = {"contexts": [256, 512], "requests": [2], "blocks": [3], "block_sizes": [16]}
    positive = ("contexts", "requests", "blocks", "block_sizes", "repeats")
    args = parser.finish(argv, {**few, "repeats": 3}, positive, rehearse=True)
    if args.rehearse:
        args.device, args.layer, args.requests, args.block_sizes = "cpu", "4,2,32", [2], [16]
        args.contexts, args.blocks, args.repeats = [64], [1, 2], 3
    if args.clock == "cpu" and args.device.startswith("cuda"):
        parser.error("--clock cpu measures nothing of what runs on a GPU: leave it out")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no CUDA device here, pass --device cpu")
    gpu = args.device.startswith("cuda")
    text = LAYERS.get(args.layer, args.layer) or ("28,4,128" if gpu else "8,2,64")
    try:
        args.heads = heads, kv_heads, size = tuple(int(part) for part in text.split(","))
        if min(heads, kv_heads, size) < 1 or heads % kv_heads:
            raise ValueError
    except ValueError:
        parser.error(
            f"--layer {args.layer}: pass query heads, key heads and head size, such as 28,4,128; "
            "query heads are a multiple of key heads"
        )
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """Return all cases. Those of published settings come first, in case the time runs out."""
    axes = (args.contexts, args.requests, args.blocks, args.block_sizes)
    every = [Case(*values) for values in itertools.product(*axes)]
    if not args.device.startswith("cuda"):
        return every
    return sorted(every, key=lambda c: (c.block_size != 32, c.requests not in (1, 16)))


def attention(run: Record) -> int:
    """Measure every case and report. Return 1 if a variant is wrong or fails."""
    args = run.args
    device, dtype, layer = torch.device(args.device), getattr(torch, args.dtype), Layer(*args.heads)
    machine = run.point("machine", partial(timing.machine, device, dtype, args.clock))

    def row(case: Case) -> dict[str, Any]:
        problem = Problem.make(case, layer, device, dtype, args.seed)
        found = measure(problem, args.variants, machine, args.repeats, args.clock)
        if all("unavailable" in one for one in found["variants"].values()):
            raise Skip(f"no variant runs here: {found['variants']}")
        return found

    for case in cases(args):
        key = "/".join(map(str, asdict(case).values()))
        run.point(key, partial(row, case), may_fail=True)
    rows = [value for key, value in run.points.items() if key != "machine"]
    if not rows:
        return 0
    reasons = {
        name: found.get("unavailable") or f"**{found}**"
        for row in rows
        for name, found in row["variants"].items()
        if "ms" not in found and "GiB of scores" not in str(found)
    }
    report = run.report(
        rehearse=args.rehearse, device=device.type, clock=args.clock, dtype=args.dtype,
        layer=f"{layer.heads} query heads, {layer.kv_heads} key heads of {layer.head_dim}",
        units=UNITS, floor=machine, summary=summary(rows),
    )  # fmt: skip
    run.write(report | {"skipped": reasons, "rows": rows})
    return int(any(v.keys() & {"wrong_by", "failed"} for r in rows for v in r["variants"].values()))


main = record.command(parse, attention, markdown)

if __name__ == "__main__":
    sys.exit(main())
