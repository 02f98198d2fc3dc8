# SPDX-License-Identifier: Apache-2.0
"""Token and confidence when the vocabulary is split over tensor-parallel ranks.

A rank holds the logits of its own tokens. Gathering them would move rows x vocabulary numbers.
Instead each rank reduces a row to a `Partial`, the ranks exchange these, and every rank merges them
to the same result. Greedy rows take one exchange. Drawn rows take another one before it, for the
largest value of the row, from which min_p counts. The noise of a draw is a function of the token's
id, so a draw does not depend on the split.

top_k and top_p need the order of a whole row. Rows with either are not handled here: the caller
gathers their logits, as vLLM does for every model.

Shape suffixes: N rows, V tokens of this rank, P ranks, C columns of an exchange.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_d2f.sampling.sample import Sampling, gumbel

Gather = Callable[[Tensor], Tensor]
"""int32 [N, C] of this rank -> [P, N, C] of all ranks, in the order of their tokens."""

HIGHEST = 0x7FFFFFFF
"""The largest int32."""


class Partial(NamedTuple):
    """What one shard of the vocabulary contributes to each row.

    Attributes:
        order_N: int64, the score of the shard's best token and its id in one number: the larger
            number is the better token, and of equal scores the lower id. The score is the token's
            value, with noise if the row is drawn.
        value_N: float32, that token's value: its logit over the temperature.
        max_N: float32, the largest value.
        sum_N: float32, the sum of exp(value - max) over the tokens that may be drawn.
        moment_N: float32, the sum of (value - max) exp(value - max) over them, where a row's
            entropy is asked for.
    """

    order_N: Tensor
    value_N: Tensor
    max_N: Tensor
    sum_N: Tensor
    moment_N: Tensor | None = None


Shard = Callable[..., Partial]
"""`shard` below, or `confidence_kernel.shard` on CUDA."""


def sample_sharded(
    shard: Shard,
    logits_NV: Tensor,
    mask_id: int,
    first_token: int,
    gather: Gather,
    sampling: Sampling | None = None,
    position_N: Tensor | None = None,
    forward_N: Tensor | None = None,
    *,
    entropy_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `sample.sample` does, over the shards of all ranks.

    Args:
        shard: reduces a shard to a partial.
        logits_NV: this rank's logits; may be changed.
        first_token: the id of the first column.
        sampling: one entry per row; top_k and top_p are not looked at. None: all rows are greedy.
        position_N, forward_N: as for `sample.sample_drawn`, given with `sampling`.
        entropy_N: as for `sample.sample_greedy`.

    Returns:
        token_N (int64) and confidence_N (float32), the same on every rank.
    """
    part: dict[str, Any] = {"first_token": first_token, "moment": entropy_N is not None}
    partial, drawn_N = shard(logits_NV, mask_id, **part), None
    if sampling is not None:
        (max_PN,) = all_gather_values((partial.max_N,), gather)
        drawn_N = sampling.temperature_R > 0
        # A quotient is rounded in the order of its dividends: this is the largest value, exactly.
        max_N = max_PN.amax(0) / torch.where(drawn_N, sampling.temperature_R, 1.0)
        partial = shard(
            logits_NV,
            mask_id,
            sampling.without_top_k_and_top_p(),
            position_N,
            forward_N,
            max_N=max_N,
            **part,
        )
    values = tuple(value for value in partial if value is not None)
    return finish(merge(Partial(*all_gather_values(values, gather))), drawn_N, entropy_N)


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
    """Reduce this rank's part of each row, in PyTorch.

    Args:
        logits_NV: changed: the mask token's becomes -inf.
        sampling: one entry per row, a temperature of 0 for greedy; top_k and top_p are not looked
            at. None: all rows are greedy.
        first_token: the id of the first column.
        max_N: the largest value of the whole row, if this is not all of it.
        moment: whether to compute `Partial.moment_N`.
    """
    if 0 <= mask_id - first_token < logits_NV.shape[1]:
        logits_NV[:, mask_id - first_token] = -torch.inf
    value_NV = logits_NV.float()
    if sampling is None:
        kept_NV = value_NV
        score_N, best_N = value_NV.max(-1)
        max_N = score_N
    else:
        if position_N is None or forward_N is None:
            raise ValueError("drawing needs position_N and forward_N")
        drawn_N = sampling.temperature_R > 0
        value_NV = value_NV / torch.where(drawn_N, sampling.temperature_R, 1.0)[:, None]
        max_N = value_NV.amax(-1) if max_N is None else max_N
        floor_N = max_N + torch.where(drawn_N, sampling.min_p_R, 0.0).log()
        kept_NV = value_NV.masked_fill(value_NV < floor_N[:, None], -torch.inf)
        token_V = first_token + torch.arange(value_NV.shape[1], device=value_NV.device)
        token_NV = token_V.expand(len(value_NV), -1)
        noise_NV = gumbel(sampling.seed_R, position_N, forward_N, token_NV)
        score_N, best_N = torch.where(drawn_N[:, None], kept_NV + noise_NV, kept_NV).max(-1)
    # A shard may hold nothing but the mask token.
    base_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    kept_NV = kept_NV - base_N[:, None]
    weight_NV = kept_NV.exp()
    return Partial(
        _order(score_N, best_N + first_token),
        value_NV.gather(1, best_N[:, None])[:, 0],
        max_N,
        weight_NV.sum(-1),
        _product(kept_NV, weight_NV).sum(-1) if moment else None,
    )


def merge(partial_PN: Partial) -> Partial:
    """Merge the partials of all ranks, in any order, to one of the whole row. They are [P, N]."""
    order_PN, value_PN, max_PN, sum_PN, moment_PN = partial_PN
    order_N, best_N = order_PN.max(0)
    max_N = max_PN.amax(0)
    base_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    shift_PN = max_PN - base_N
    if moment_PN is not None:  # from the rank's maximum to that of the row
        moment_PN = (moment_PN + _product(shift_PN, sum_PN)) * shift_PN.exp()
    return Partial(
        order_N,
        value_PN.gather(0, best_N[None])[0],
        max_N,
        (sum_PN * shift_PN.exp()).sum(0),
        None if moment_PN is None else moment_PN.sum(0),
    )


def finish(
    partial: Partial, drawn_N: Tensor | None = None, entropy_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return token (int64) and confidence (float32) from the partial of a whole row.

    A row without a distribution gets confidence 0 and the token that `sample.sample` gives it.

    Args:
        drawn_N: bool, rows with a temperature; None: there are none.
        entropy_N: as for `sample.sample_greedy`; the partial has a moment then.
    """
    token_N = HIGHEST - (partial.order_N & 0xFFFFFFFF)
    log_weight_N = partial.value_N - partial.max_N
    if entropy_N is not None:
        assert partial.moment_N is not None
        # The mean of log p is that of value - max, less the logarithm of the sum.
        log_weight_N = torch.where(entropy_N, partial.moment_N / partial.sum_N, log_weight_N)
    confidence_N = log_weight_N.exp() / partial.sum_N
    bad_N = ~confidence_N.isfinite()
    if drawn_N is not None:
        token_N = token_N.masked_fill(bad_N & drawn_N, 0)
    return token_N, confidence_N.masked_fill(bad_N, 0)


def all_gather_values(values: tuple[Tensor, ...], gather: Gather) -> tuple[Tensor, ...]:
    """Gather several tensors of each rank at once: [P, N] of each [N], [P, N, C] of each [N, C].

    Their bits travel side by side, so an exchange of any types is exact.
    """
    columns = [value.contiguous().view(torch.int32).view(len(value), -1) for value in values]
    widths = [column.shape[1] for column in columns]
    parts = gather(torch.cat(columns, 1)).split(widths, dim=-1)
    return tuple(
        part.contiguous().view(value.dtype).view(-1, *value.shape)
        for part, value in zip(parts, values, strict=True)
    )


def _product(log_weight: Tensor, weight: Tensor) -> Tensor:
    """Return the product of both, 0 where the logarithm is -inf."""
    return torch.where(log_weight == -torch.inf, 0.0, log_weight * weight)


def _order(score_N: Tensor, token_N: Tensor) -> Tensor:
    """Return `Partial.order_N`. NaN is above all numbers, and -0 equals 0, as in the kernel."""
    bits_N = torch.where(score_N == 0, 0.0, score_N).view(torch.int32)
    key_N = torch.where(score_N.isnan(), HIGHEST, bits_N ^ ((bits_N >> 31) & HIGHEST))
    return (key_N.long() << 32) | (HIGHEST - token_N)
