# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that do on CUDA what `sampling.sample` does: a token and its probability per row.

One program reduces one tile of one row to a maximum, a sum and the best token; a second kernel
reduces the tiles of a row. So few rows still fill the device, and no softmax is stored. The tiles
depend on the size of the vocabulary alone, so a row's result does not depend on the batch. Logits
are read in their own type and reduced in float32.

top_k and top_p keep a prefix of the tokens in the order of (logit, then lower id). The kernel finds
its end, the last logit and among equal logits the last id, without a sort: by bisection over the
bit pattern of the float, which is exact after at most 32 counts of the row.

A row with a NaN or +inf, or without a finite logit, gets confidence 0 and the token that
`sampling.sample` gives it.

Shape suffixes: N rows, V vocabulary (or a rank's shard of it), C tiles of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_d2f.sampling.sample import Sampling
from vllm_d2f.sampling.tensor_parallel import Partial, finish

MAX_TILE = 4096
"""Most logits of a program. It must not follow from the number of rows: sums would then depend on
the batch."""

MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
STEP = tl.constexpr(0x9E3779B97F4A7C15)
LEAST = tl.constexpr(-(1 << 63))


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
    tile = min(MAX_TILE, max(triton.next_power_of_2(vocabulary), 16))
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
        _cut[(rows,)](*line, *limits, *end, *split, tile, num_warps=warps)
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
def _from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _order(score, token):
    """Put score and id into one number; of equal scores the lower id gives the larger number."""
    return (_key(score).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _values(logits, row_stride, size, mask_at, temperature, column, DRAWN: tl.constexpr):
    """Load logits over temperature, -inf for the mask token and beyond the row."""
    row = tl.program_id(0).to(tl.int64)
    inside = (column < size) & (column != mask_at)
    x = tl.load(logits + row * row_stride + column, mask=inside, other=-float("inf"))
    x = x.to(tl.float32)
    if DRAWN:
        t = tl.load(temperature + row)
        # Rounded as PyTorch divides; `/` is an approximation here. The shapes must agree.
        x = tl.where(t > 0, tl.div_rn(x, tl.where(t > 0, t, 1.0) + tl.zeros_like(x)), x)
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
def _mass(
    logits, row_stride, size, mask_at, temperature, base, least, COUNT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Count the values with a key of at least `least`, or sum their exponentials."""
    total = tl.full((), 0.0, tl.float32)
    if COUNT:
        total = tl.full((), 0, tl.int32)
    for begin in range(0, size, TILE):
        column = begin + tl.arange(0, TILE)
        x = _values(logits, row_stride, size, mask_at, temperature, column, True)
        kept = (_key(x).to(tl.int64) >= least) & (column < size)
        if COUNT:
            total += tl.sum(kept.to(tl.int32))
        else:
            total += tl.sum(tl.where(kept, tl.exp(x - base), 0.0))
    return total


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
    tiles,
    ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Find the end of what min_p, top_k and top_p keep: the least value and its last id."""
    row = tl.program_id(0).to(tl.int64)
    base = _row_max(max_tiles, row_max, tiles, ROW_TILES)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    floor = tl.load(min_p + row)
    cut = tl.where(floor > 0, base + tl.log(floor), -float("inf"))
    low = _key(cut).to(tl.int64)
    last = size
    # A greedy row keeps all, and a row without a finite maximum has nothing to keep.
    limited = ((k > 0) | (p < 1)) & (tl.load(temperature + row) > 0)
    if limited & (base > -float("inf")) & (base < float("inf")):
        top = _key(base).to(tl.int64)
        # How many of the values that equal the cut stay.
        ties = tl.full((), 0x7FFFFFFF, tl.int32)
        if k > 0:
            count = _mass(logits, row_stride, size, mask_at, temperature, base, low, True, TILE)
            if k < count:
                high = top
                while low < high:
                    middle = low + (high - low + 1) // 2
                    count = _mass(
                        logits, row_stride, size, mask_at, temperature, base, middle, True, TILE
                    )
                    if count >= k:
                        low = middle
                    else:
                        high = middle - 1
                above = _mass(
                    logits, row_stride, size, mask_at, temperature, base, low + 1, True, TILE
                )
                ties = (k - above).to(tl.int32)
        if p < 1:
            above = _mass(
                logits, row_stride, size, mask_at, temperature, base, low + 1, False, TILE
            )
            equal = _mass(logits, row_stride, size, mask_at, temperature, base, low, True, TILE)
            equal -= _mass(
                logits, row_stride, size, mask_at, temperature, base, low + 1, True, TILE
            )
            each = tl.exp(_from_key(low.to(tl.int32)) - base)
            goal = p * (above + tl.minimum(equal, ties).to(tl.float32) * each)
            high = top
            edge = low
            while edge < high:
                middle = edge + (high - edge + 1) // 2
                mass = _mass(
                    logits, row_stride, size, mask_at, temperature, base, middle, False, TILE
                )
                if mass >= goal:
                    edge = middle
                else:
                    high = middle - 1
            if edge > low:
                ties = tl.full((), 0x7FFFFFFF, tl.int32)
            low = edge
            above = _mass(
                logits, row_stride, size, mask_at, temperature, base, low + 1, False, TILE
            )
            each = tl.exp(_from_key(low.to(tl.int32)) - base)
            if each > 0:
                need = tl.ceil((goal - above) / each)
                need = tl.minimum(tl.maximum(need, 1.0), 2147483520.0).to(tl.int32)
                ties = tl.minimum(ties, need)
        cut = _from_key(low.to(tl.int32))
        seen = tl.full((), 0, tl.int32)
        last = tl.full((), -1, tl.int32)
        for begin in range(0, size, TILE):
            column = begin + tl.arange(0, TILE)
            x = _values(logits, row_stride, size, mask_at, temperature, column, True)
            equals = (_key(x).to(tl.int64) == low) & (column < size)
            rank = seen + tl.cumsum(equals.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(equals & (rank <= ties), column, -1)))
            seen += tl.sum(equals.to(tl.int32))
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
    column = (0x7FFFFFFF - (order & 0xFFFFFFFF)).to(tl.int32) - first_token
    value = _values(logits, row_stride, size, mask_at, temperature, column, temperature is not None)
    tl.store(order_out + row, order)
    tl.store(value_out + row, value)
    tl.store(max_out + row, largest)
    tl.store(sum_out + row, total)
    if moment_out is not None:
        tl.store(moment_out + row, moment)
