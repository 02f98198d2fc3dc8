# SPDX-License-Identifier: Apache-2.0
"""What top_k and top_p keep of rows whose vocabulary is split over tensor-parallel ranks.

Both keep a prefix of the tokens in order of (value, then lower id). Its end is found digit by
digit: values become integers of the same order, each rank says how many tokens (top_k) or how much
probability (top_p) it has for each value of the leading eight bits, the sums of all ranks decide
these bits, and so on for the next. Four exchanges of 256 numbers a row find the exact value, of a
vocabulary of any size, and nobody waits for the device. Among equal values the lower ids stay,
which takes the number of them on each rank.

Shape suffixes: N rows, V tokens of this rank, P ranks, D values of a digit.
"""

import torch
from torch import Tensor

from vllm_d2f.sampling.exchange import Gather, exchange

DIGIT_BITS = 8


def cut(
    value_NV: Tensor, max_N: Tensor, top_k_N: Tensor, top_p_N: Tensor, rank: int, gather: Gather
) -> Tensor:
    """Which of this rank's tokens stay.

    Args:
        value_NV: float32, logits over temperature, -inf for what may not be drawn.
        max_N: float32, the largest of a row over all ranks. If it is not finite, any tokens stay.
        top_k_N: int64, 0 for no limit.
        top_p_N: float32, of the probability that top_k leaves; 1 for no limit.
        rank: this rank's place in what `gather` returns.

    Returns:
        bool [N, V].
    """
    key_NV = _keys(value_NV)
    one_NV = torch.ones((), dtype=torch.float64, device=key_NV.device).expand(key_NV.shape)
    kept_NV = _prefix(key_NV, one_NV, top_k_N.double(), rank, gather)
    kept_NV |= (top_k_N == 0)[:, None]

    mass_NV = (value_NV.double() - max_N[:, None]).exp().masked_fill(~kept_NV, 0.0)
    (whole_PN,) = exchange((mass_NV.sum(1),), gather)
    likely_NV = _prefix(key_NV, mass_NV, top_p_N * whole_PN.sum(0), rank, gather)
    return kept_NV & (likely_NV | (top_p_N >= 1)[:, None])


def _prefix(
    key_NV: Tensor, weight_NV: Tensor, wanted_N: Tensor, rank: int, gather: Gather
) -> Tensor:
    """The shortest prefix of each row, in order of (key, then lower id), that weighs `wanted_N`.

    The first token stays at any rate, and all do that weigh something if they weigh less.

    Args:
        key_NV: int64, in [0, 2 ** 32).
        weight_NV: float64, at least 0.
    """
    digits = 1 << DIGIT_BITS
    end_N = torch.zeros_like(wanted_N, dtype=torch.int64)  # the leading bits of the end's key
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        among_NV = key_NV >> (shift + DIGIT_BITS) == end_N[:, None]
        digit_NV = torch.where(among_NV, (key_NV >> shift) & (digits - 1), digits)
        weight_ND = weight_NV.new_zeros(len(key_NV), digits + 1)
        weight_ND.scatter_add_(1, digit_NV, weight_NV)
        (weight_PND,) = exchange((weight_ND[:, :digits],), gather)
        weight_ND = weight_PND.sum(0)
        # With this digit and all above it.
        down_ND = weight_ND.flip(1).cumsum(1).flip(1)
        reached_ND = (down_ND >= wanted_N[:, None]) & (weight_ND > 0)
        digit_N = _last(reached_ND)
        # If all weigh less, by a rounding or by far: the lowest digit that weighs something.
        first_N = (weight_ND > 0).int().argmax(1)
        digit_N = torch.where(digit_N < 0, first_N, digit_N)
        above_N = (down_ND - weight_ND).gather(1, digit_N[:, None])[:, 0]
        wanted_N = wanted_N - above_N
        end_N = (end_N << DIGIT_BITS) | digit_N
    equal_NV = key_NV == end_N[:, None]
    counted_NV = equal_NV & (weight_NV > 0)
    # All tokens with the end's key weigh the same. Lower ranks have lower ids.
    each_PN, ties_PN = exchange(
        (torch.where(counted_NV, weight_NV, 0.0).amax(1), counted_NV.sum(1)), gather
    )
    stay_N = (wanted_N / each_PN.amax(0)).nan_to_num(1.0, posinf=1.0).ceil().clamp(min=1)
    stay_N = stay_N - ties_PN[:rank].sum(0)
    tie_NV = counted_NV.cumsum(1)
    return (key_NV > end_N[:, None]) | (counted_NV & (tie_NV <= stay_N[:, None]))


def _keys(value_NV: Tensor) -> Tensor:
    """int64 in [0, 2 ** 32), in the order of the floats; -0 equals 0."""
    bits_NV = torch.where(value_NV == 0, 0.0, value_NV).view(torch.int32)
    return (bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)).long() + (1 << 31)


def _last(flag_ND: Tensor) -> Tensor:
    """The last true column of each row, -1 if there is none."""
    column_D = torch.arange(flag_ND.shape[1], device=flag_ND.device)
    return torch.where(flag_ND, column_D, -1).amax(1)
