# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that do on CUDA what `sampling.sample` does: a token and its probability per row.

One program reduces one tile of one row to a maximum, a sum and the best token; a second kernel
reduces the tiles of a row. So few rows still fill the device, and no softmax is stored. The tiles
depend on the size of the vocabulary alone, so a row's result does not depend on the batch. Logits
are read in their own type and reduced in float32.

top_k and top_p keep a prefix of the tokens in the order of (logit, then lower id). The kernel finds
its end, the last logit and among equal logits the last id, without a sort: by a search over the
bit pattern of the logit. Each pass over the row counts, or weighs, what reaches each of several
pivots, and leaves the bit patterns between two of them. So the end is exact after a few passes, 7
for bfloat16.

A row with a NaN or +inf, or without a finite logit, gets confidence 0 and the token that
`sampling.sample` gives it.

Shape suffixes: N rows, V vocabulary (or a rank's shard of it), C tiles of a row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_d2f.sampling.sample import Sampling
from vllm_d2f.sampling.tensor_parallel import Partial, finish

MAX_TILE = 4096
"""Most logits of a program. It must not follow from the number of rows: sums would then depend on
the batch."""

CUT_TILE = 4096
"""Most logits that `_cut` takes at a time. It holds one sum per pivot for each of them."""
CUT_WARPS = 32
PIVOTS = 4
"""Pivots of one pass of the search in `_cut`, a power of two."""

MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
STEP = tl.constexpr(0x9E3779B97F4A7C15)
LEAST = tl.constexpr(-(1 << 63))
LOG2_E = tl.constexpr(1.4426950408889634)


def sample(
    logits_NV: Tensor,
    mask_id: int,
    sampling: Sampling | None = None,
    position_N: Tensor | None = None,
    forward_N: Tensor | None = None,
    *,
    entropy_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample from rows of both kinds, greedy and drawn.

    Args:
        logits_NV: bfloat16, float16 or float32; not changed.
        sampling: one entry per row, a temperature of 0 for greedy; None: all rows are greedy.
        position_N, forward_N: as for `sample.sample_drawn`, given with `sampling`.
        entropy_N: as for `sample.sample_greedy`.

    Returns:
        token_N (int64) and confidence_N (float32).
    """
    moment = entropy_N is not None
    partial = shard(logits_NV, mask_id, sampling, position_N, forward_N, moment=moment)
    return finish(partial, None if sampling is None else sampling.temperature_R > 0, entropy_N)


def shard(
    logits_NV: Tensor,
    mask_id: int,
    sampling: Sampling | None = None,
    position_N: Tensor | None = None,
    forward_N: Tensor | None = None,
    *,
    first_token: int = 0,
    max_N: Tensor | None = None,
    moment: bool = False,
) -> Partial:
    """Reduce this rank's part of each row; see `tensor_parallel.sample_sharded`.

    top_k and top_p are looked for in this shard only, so leave them out where it is not all.

    Args:
        first_token: the id of the shard's first column.
        max_N: the largest logit over temperature of the whole row, if this is not all of it.
        moment: whether to compute `Partial.moment_N`.
    """
    if sampling is not None and (position_N is None or forward_N is None):
        raise ValueError("drawing needs position_N and forward_N")
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    rows, vocabulary = logits_NV.shape
    whole = max(triton.next_power_of_2(vocabulary), 16)
    tile = min(MAX_TILE, whole)
    tiles = triton.cdiv(vocabulary, tile)

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_NV.device)

    fields = 4 if moment else 3
    out = Partial(new(torch.int64, rows), *(new(torch.float32, rows) for _ in range(fields)))
    if rows == 0:
        return out
    # What several kernels take: the rows, the reductions of their tiles, and how a row is cut.
    temperature_N = None if sampling is None else sampling.temperature_R
    line = (logits_NV, logits_NV.stride(0), vocabulary, mask_id - first_token, temperature_N)
    order_NC = new(torch.int64, rows, tiles)
    max_NC, sum_NC = new(torch.float32, rows, tiles), new(torch.float32, rows, tiles)
    moment_NC = new(torch.float32, rows, tiles) if moment else None
    split = (tiles, triton.next_power_of_2(tiles))
    warps = 8 if tile > 2048 else 4
    tile_out = (order_NC, max_NC, sum_NC, moment_NC)
    _tiles[(rows, tiles)](*line, *tile_out, first_token, tile, num_warps=warps)
    kept_NC = None
    if sampling is not None:
        end = (max_NC, max_N, new(torch.float32, rows), new(torch.int32, rows))
        limits = (sampling.top_k_R, sampling.top_p_R, sampling.min_p_R)
        # Bits at the end of a float32 that are zero in every logit: 16 of bfloat16.
        unused = round(math.log2(torch.finfo(logits_NV.dtype).eps)) + 23
        search = (min(CUT_TILE, whole), PIVOTS, unused)
        best = (order_NC, first_token)
        _cut[(rows,)](*line, *limits, *end, *best, *split, *search, num_warps=CUT_WARPS)
        kept_NC = new(torch.float32, rows, tiles)
        draw = (sampling.seed_R, position_N, forward_N)
        out_NC = (order_NC, kept_NC, moment_NC, first_token)
        _draw[(rows, tiles)](*line, *draw, *end, *out_NC, *split, tile, num_warps=warps)
    reduced = (*tile_out, kept_NC, max_N)
    _reduce[(rows,)](*line, *reduced, *out, first_token, *split, num_warps=1)
    return out


@triton.jit
def _key(x):
    """Map floats to int32 in the same order, NaN above all, and -0 equal to 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _from_key(key, UNUSED: tl.constexpr):
    """Return the float of a key (int64) without its last bits, which are unused in the float."""
    key = (key << UNUSED).to(tl.int32)
    bits = (key ^ ((key >> 31) & 0x7FFFFFFF)) >> UNUSED << UNUSED
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _order(score, token):
    """Put score and id into one number; of equal scores the lower id gives the larger number."""
    return (_key(score).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _logits(logits, row_stride, size, mask_at, column):
    """Load logits in float32, -inf for the mask token and beyond the row."""
    row = tl.program_id(0).to(tl.int64)
    # The mask token is not part of the load's mask: loads of several logits at once need that.
    x = tl.load(logits + row * row_stride + column, mask=column < size, other=-float("inf"))
    return tl.where(column == mask_at, -float("inf"), x.to(tl.float32))


@triton.jit
def _over(x, temperature):
    """Divide by a temperature above 0."""
    # Rounded as PyTorch divides; `/` is an approximation here. The shapes must agree.
    return tl.div_rn(x, temperature + tl.zeros_like(x))


@triton.jit
def _values(logits, row_stride, size, mask_at, temperature, column, DRAWN: tl.constexpr):
    """Load logits over temperature, -inf for the mask token and beyond the row."""
    x = _logits(logits, row_stride, size, mask_at, column)
    if DRAWN:
        t = tl.load(temperature + tl.program_id(0).to(tl.int64))
        x = tl.where(t > 0, _over(x, tl.where(t > 0, t, 1.0)), x)
    return x


@triton.jit
def _moment(log_weight, nothing):
    """Sum (value - max) exp(value - max), where there is something."""
    return tl.sum(tl.where(nothing, 0.0, log_weight * tl.exp(log_weight)))


@triton.jit
def _row_max(max_tiles, row_max, tiles, ROW_TILES: tl.constexpr):
    """Load the row's largest value, or reduce those of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    if row_max is None:
        at = tl.arange(0, ROW_TILES)
        value = tl.load(max_tiles + row * tiles + at, mask=at < tiles, other=-float("inf"))
        largest = tl.max(value)
    else:
        largest = tl.load(row_max + row)
    return largest


@triton.jit
def _tiles(
    logits,
    row_stride,
    size,
    mask_at,
    temperature,
    order_out,
    max_out,
    sum_out,
    moment_out,
    first_token,
    TILE: tl.constexpr,
):
    """Reduce a tile to its best token, largest value and sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    x = _values(logits, row_stride, size, mask_at, temperature, column, temperature is not None)
    order = tl.where(column < size, _order(x, column + first_token), LEAST)
    largest = tl.max(tl.where(x != x, -float("inf"), x))
    base = tl.where(largest == -float("inf"), 0.0, largest)
    at = row * tl.num_programs(1) + tile
    tl.store(order_out + at, tl.max(order))
    tl.store(max_out + at, largest)
    tl.store(sum_out + at, tl.sum(tl.exp(x - base)))
    if moment_out is not None:
        tl.store(moment_out + at, _moment(x - base, x == -float("inf")))


@triton.jit
def _column(order, first_token):
    """Return the column of what `_order` returns."""
    return (0x7FFFFFFF - (order & 0xFFFFFFFF)).to(tl.int32) - first_token


@triton.jit
def _search(
    logits, row_stride, size, mask_at, top, scale, goal,
    TILE: tl.constexpr, PIVOTS: tl.constexpr, UNUSED: tl.constexpr,
):  # fmt: skip
    """Find the largest logit so that it and the larger ones weigh at least `goal`.

    The weight of a logit is exp2((logit - top) * scale), or 1 without a scale, whose sums float32
    holds exactly. Each sum adds the same columns in the same order. So the sum from a lower logit
    up is never smaller, and a row's sums do not depend on the batch.

    If all weigh less than `goal`, the result is -inf.
    """
    low = _key(tl.full((), -float("inf"), tl.float32)).to(tl.int64) >> UNUSED
    high = _key(top).to(tl.int64) >> UNUSED
    while low < high:
        step = (high - low) // (PIVOTS + 1) + 1
        key = tl.minimum(low + step * (1 + tl.arange(0, PIVOTS)), high)
        pivot = _from_key(key, UNUSED)[:, None]
        total = tl.zeros((PIVOTS, TILE), tl.float32)
        for begin in range(0, size, TILE):
            column_1T = begin + tl.arange(0, TILE)[None, :]
            x_1T = _logits(logits, row_stride, size, mask_at, column_1T)
            weight_1T = 1.0
            if scale is not None:
                weight_1T = tl.exp2((x_1T - top) * scale)
            total = tl.where(x_1T >= pivot, total + weight_1T, total)
        reached = tl.sum((tl.sum(total, 1) >= goal).to(tl.int32))
        low = tl.minimum(low + step * reached, high)
        high = tl.minimum(low + step - 1, high)
    return _from_key(low, UNUSED)


@triton.jit
def _split(
    logits, row_stride, size, mask_at, temperature, top, scale, cut,
    TILE: tl.constexpr,
):  # fmt: skip
    """Count what is above a value and what equals it; weigh the former and one of the latter."""
    above = tl.zeros((TILE,), tl.int32)
    equal = tl.zeros((TILE,), tl.int32)
    weight = tl.zeros((TILE,), tl.float32)
    each = tl.zeros((TILE,), tl.float32)
    for begin in range(0, size, TILE):
        x = _logits(logits, row_stride, size, mask_at, begin + tl.arange(0, TILE))
        value = _over(x, temperature)
        one = tl.exp2((x - top) * scale)
        above += (value > cut).to(tl.int32)
        weight = tl.where(value > cut, weight + one, weight)
        equal += (value == cut).to(tl.int32)
        each = tl.where(value == cut, one, each)
    return tl.sum(above), tl.sum(equal), tl.sum(weight), tl.max(each)


@triton.jit
def _cut(
    logits,
    row_stride,
    size,
    mask_at,
    temperature,
    top_k,
    top_p,
    min_p,
    max_tiles,
    row_max,
    cut_out,
    last_out,
    order_in,
    first_token,
    tiles,
    ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
    UNUSED: tl.constexpr,
):
    """Find the end of what min_p, top_k and top_p keep: the least value and its last id.

    The search goes over the logits, which need no division. Their order is that of the values, but
    different logits can have one value. So `_split` counts in values.
    """
    row = tl.program_id(0).to(tl.int64)
    base = _row_max(max_tiles, row_max, tiles, ROW_TILES)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    t = tl.load(temperature + row)
    floor = tl.load(min_p + row)
    cut = tl.where(floor > 0, base + tl.log(floor), -float("inf"))
    last = size
    at = tl.arange(0, ROW_TILES)
    order = tl.max(tl.load(order_in + row * tiles + at, mask=at < tiles, other=LEAST))
    top = _logits(logits, row_stride, size, mask_at, _column(order, first_token))
    # A greedy row keeps all, and a row with a NaN or without a finite maximum has nothing to keep.
    by_k = (k > 0) & (k < size)
    if (by_k | (p < 1)) & (t > 0) & (top > -float("inf")) & (base < float("inf")):
        scale = LOG2_E / t
        most = tl.full((), size, tl.int64)
        if by_k:
            x = _search(
                logits, row_stride, size, mask_at, top, None, k.to(tl.float32), TILE, PIVOTS, UNUSED
            )
            value = _over(x, t)
            most = tl.where(value >= cut, k, most)
            cut = tl.maximum(value, cut)
        above, equal, weight, each = _split(
            logits, row_stride, size, mask_at, t, top, scale, cut, TILE
        )
        # How many of the values that equal the cut stay.
        ties = tl.minimum(equal, most.to(tl.int32) - above)
        if p < 1:
            goal = p * (weight + ties.to(tl.float32) * each)
            x = _search(logits, row_stride, size, mask_at, top, scale, goal, TILE, PIVOTS, UNUSED)
            value = _over(x, t)
            if value > cut:
                cut = value
                above, equal, weight, each = _split(
                    logits, row_stride, size, mask_at, t, top, scale, cut, TILE
                )
                ties = equal
            if each > 0:
                need = tl.ceil((goal - weight) / each)
                need = tl.minimum(tl.maximum(need, 1.0), 2147483520.0).to(tl.int32)
                ties = tl.minimum(ties, need)
        if ties < equal:
            # The tile of the last one that stays, then the place in it.
            begin = tl.full((), -TILE, tl.int32)
            before = tl.full((), 0, tl.int32)
            seen = tl.full((), 0, tl.int32)
            while seen < ties:
                begin += TILE
                column = begin + tl.arange(0, TILE)
                x = _over(_logits(logits, row_stride, size, mask_at, column), t)
                before = seen
                seen += tl.sum((x == cut).to(tl.int32))
            column = begin + tl.arange(0, TILE)
            x = _over(_logits(logits, row_stride, size, mask_at, column), t)
            rank = before + tl.cumsum((x == cut).to(tl.int32), 0)
            last = tl.max(tl.where((x == cut) & (rank <= ties), column, -1))
    tl.store(cut_out + row, cut)
    tl.store(last_out + row, last)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _draw(
    logits,
    row_stride,
    size,
    mask_at,
    temperature,
    seed,
    position,
    forward,
    max_tiles,
    row_max,
    cut_in,
    last_in,
    order_out,
    kept_out,
    moment_out,
    first_token,
    tiles,
    ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reduce a tile to its best token with noise, and the sum of what may be drawn in it."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tl.load(temperature + row) > 0:
        base = _row_max(max_tiles, row_max, tiles, ROW_TILES)
        column = tile * TILE + tl.arange(0, TILE)
        x = _values(logits, row_stride, size, mask_at, temperature, column, True)
        cut = tl.load(cut_in + row)
        last = tl.load(last_in + row)
        # A NaN is never kept here; `sum_out` of the first pass carries it.
        kept = (x > cut) | ((x == cut) & (column <= last))
        # sample.gumbel
        start = _mix(tl.load(seed + row).to(tl.uint64)) + tl.load(position + row).to(tl.uint64)
        start = _mix(_mix(start) + tl.load(forward + row).to(tl.uint64))
        token = column + first_token
        bits = _mix(start + token.to(tl.uint64) * STEP)
        uniform = ((bits >> 40).to(tl.int32).to(tl.float64) + 0.5) / 16777216.0
        noise = -tl.log(-tl.log(uniform)).to(tl.float32)
        score = tl.where(kept, x - base + noise, -float("inf"))
        order = tl.where(column < size, _order(score, token), LEAST)
        at = row * tiles + tile
        tl.store(order_out + at, tl.max(order))
        tl.store(kept_out + at, tl.sum(tl.where(kept, tl.exp(x - base), 0.0)))
        if moment_out is not None:  # replaces the value of `_tiles`, from another maximum
            tl.store(moment_out + at, _moment(x - base, ~kept | (x == -float("inf"))))


@triton.jit
def _reduce(
    logits,
    row_stride,
    size,
    mask_at,
    temperature,
    order_in,
    max_in,
    sum_in,
    moment_in,
    kept_in,
    row_max,
    order_out,
    value_out,
    max_out,
    sum_out,
    moment_out,
    first_token,
    tiles,
    ROW_TILES: tl.constexpr,
):
    """Reduce the tiles of a row to one partial."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, ROW_TILES)
    there = at < tiles
    order = tl.max(tl.load(order_in + row * tiles + at, mask=there, other=LEAST))
    tile_max = tl.load(max_in + row * tiles + at, mask=there, other=-float("inf"))
    tile_sum = tl.load(sum_in + row * tiles + at, mask=there, other=0.0)
    largest = tl.max(tile_max)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(tile_sum * tl.exp(tile_max - base))
    moment = 0.0
    if moment_in is not None:
        tile_moment = tl.load(moment_in + row * tiles + at, mask=there, other=0.0)
        shift = tl.where(tile_max == -float("inf"), 0.0, tile_max - base)
        moment = tl.sum((tile_moment + shift * tile_sum) * tl.exp(shift))
    if kept_in is not None:  # noqa: SIM102, the first is decided when the kernel is compiled
        if tl.load(temperature + row) > 0:
            largest = _row_max(max_in, row_max, tiles, ROW_TILES)
            kept = tl.sum(tl.load(kept_in + row * tiles + at, mask=there, other=0.0))
            # NaN and infinity are seen in the sum over the whole row only.
            total = tl.where(total == total, kept, total)
            if moment_in is not None:
                moment = tl.sum(tile_moment)
    column = _column(order, first_token)
    value = _values(logits, row_stride, size, mask_at, temperature, column, temperature is not None)
    tl.store(order_out + row, order)
    tl.store(value_out + row, value)
    tl.store(max_out + row, largest)
    tl.store(sum_out + row, total)
    if moment_out is not None:
        tl.store(moment_out + row, moment)
