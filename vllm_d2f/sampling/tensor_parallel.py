# SPDX-License-Identifier: Apache-2.0
"""Token and confidence when the vocabulary is split over tensor-parallel ranks.

A rank holds the logits of its tokens only. Gathering them would move rows x vocabulary numbers;
what a row needs from each rank is its best token, that token's logit, the largest logit and the sum
of the exponentials. Greedy rows take one exchange of these, drawn ones another before it, for the
largest logit, from which min_p counts. Noise is keyed by token, so a draw does not depend on the
split. Where top_k and top_p cut a row takes some more (`vocab_cut`).

Shape suffixes: N rows, V tokens of this rank, P ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_d2f.sampling.exchange import Gather, exchange
from vllm_d2f.sampling.sample import Sampling, gumbel
from vllm_d2f.sampling.vocab_cut import cut


class Partial(NamedTuple):
    """What one rank says of each row.

    Attributes:
        score_N: float32, of its best token: the logit over temperature, with noise if drawn.
        token_N: int64, that token.
        value_N: float32, its logit over temperature.
        max_N: float32, the largest of these.
        sum_N: float32, the sum of exp(value - max) over the tokens that may be drawn.
    """

    score_N: Tensor
    token_N: Tensor
    value_N: Tensor
    max_N: Tensor
    sum_N: Tensor


def propose_sharded(
    logits_NV: Tensor,
    mask_id: int,
    first_token: int,
    gather: Gather,
    sampling: Sampling | None = None,
    position_N: Tensor | None = None,
    forward_N: Tensor | None = None,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`proposal.propose_greedy` and `propose_drawn` over all ranks.

    Args:
        logits_NV: this rank's, changed: the mask token's becomes -inf.
        first_token: the id of the first column.
        sampling: one entry per row, a temperature of 0 for greedy; None: all are greedy.
        position_N, forward_N: as for `proposal.propose_drawn`, given with `sampling`.
        rank: this rank's place in what `gather` returns; None if top_k and top_p are not looked at.

    Returns:
        token_N (int64) and confidence_N (float32), the same on every rank.
    """
    if 0 <= mask_id - first_token < logits_NV.shape[1]:
        logits_NV[:, mask_id - first_token] = -torch.inf
    if sampling is None:
        return merge(exchange(greedy_partial(logits_NV, first_token), gather))
    if position_N is None or forward_N is None:
        raise ValueError("drawing needs position_N and forward_N")
    drawn_N = sampling.temperature_R > 0
    value_NV = logits_NV.float() / torch.where(drawn_N, sampling.temperature_R, 1.0)[:, None]
    (max_PN,) = exchange((value_NV.amax(-1),), gather)
    max_N = max_PN.amax(0)
    floor_N = max_N + torch.where(drawn_N, sampling.min_p_R, 0.0).log()
    kept_NV = value_NV.masked_fill(value_NV < floor_N[:, None], -torch.inf)
    if rank is not None:
        top_k_N = torch.where(drawn_N, sampling.top_k_R, 0)
        top_p_N = torch.where(drawn_N, sampling.top_p_R, 1.0)
        stays_NV = cut(kept_NV, max_N, top_k_N, top_p_N, rank, gather)
        kept_NV = kept_NV.masked_fill(~stays_NV, -torch.inf)
    token_V = first_token + torch.arange(value_NV.shape[1], device=value_NV.device)
    token_NV = token_V.expand(len(value_NV), -1)
    noise_NV = gumbel(sampling.seed_R, position_N, forward_N, token_NV)
    score_N, best_N = torch.where(drawn_N[:, None], kept_NV + noise_NV, kept_NV).max(-1)
    partial = Partial(
        score_N,
        best_N + first_token,
        value_NV.gather(1, best_N[:, None])[:, 0],
        max_N,
        (kept_NV - max_N[:, None]).exp().sum(-1),
    )
    return merge(exchange(partial, gather))


def greedy_partial(logits_NV: Tensor, first_token: int) -> Partial:
    """One rank's part of `propose_greedy`."""
    top_N, best_N = logits_NV.max(-1)
    top_N = top_N.float()
    # A shard may hold nothing but the mask token.
    base_N = torch.where(top_N == -torch.inf, 0.0, top_N)
    sum_N = (logits_NV.float() - base_N[:, None]).exp().sum(-1)
    return Partial(top_N, best_N + first_token, top_N, top_N, sum_N)


def merge(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Token (int64) and confidence (float32) from all ranks' partials, each [P, N].

    Of equal scores the lowest token wins. A row with a NaN gets confidence 0.
    """
    score_PN, token_PN, value_PN, max_PN, sum_PN = parts
    best_N = score_PN.amax(0)
    candidate_PN = torch.where(score_PN == best_N, token_PN, 1 << 31)
    token_N, rank_N = candidate_PN.min(0)
    token_N = torch.where(token_N == 1 << 31, token_PN[0], token_N)
    max_N = max_PN.amax(0)
    sum_N = (sum_PN * (max_PN - max_N).exp()).sum(0)
    confidence_N = (value_PN.gather(0, rank_N[None])[0] - max_N).exp() / sum_N
    return token_N, confidence_N.nan_to_num_(0.0, posinf=0.0)
