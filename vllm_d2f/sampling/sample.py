# SPDX-License-Identifier: Apache-2.0
"""Sample a token and its probability from each row of logits.

At temperature 0 the token is the most probable one. Above, it is drawn from the distribution that
temperature, min_p, top_k and top_p leave (in vLLM's order), and the confidence is the token's
probability in that distribution. For rows of the rule `entropy` it is exp(-H) instead, where H is
the distribution's entropy in nats. A draw is a function of (seed, position, forward) and the
logits, so it is the same whatever else is in the batch.

A row with a NaN or +inf, or without a finite logit, has no distribution. Its confidence is 0, and
every other confidence is above 0. So such a row is never accepted for its confidence. A fully
activated block still decodes one position per forward, which bounds the number of forwards whatever
the model computes. The token of such a row is the first NaN, else the first largest, if it is
greedy, and token 0 if it is drawn.

Shape suffixes: N rows (one masked position each), V vocabulary, R requests.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(slots=True)
class Sampling:
    """Sampling settings, one entry per row or request.

    Attributes:
        temperature_R: float32, 0 for greedy.
        top_k_R: int64, 0 for no limit.
        top_p_R, min_p_R: float32, 1 and 0 for no limit.
        seed_R: int64.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device | str | None = None) -> "Sampling":
        """Make rows that take the most probable token."""

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        return cls(
            temperature_R=full(0, torch.float32),
            top_k_R=full(0, torch.int64),
            top_p_R=full(1, torch.float32),
            min_p_R=full(0, torch.float32),
            seed_R=full(0, torch.int64),
        )

    def put(self, index_N: Tensor, rows: "Sampling") -> None:
        """Write the given rows."""
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, index_N, getattr(rows, field.name))

    def rows(self, index_N: Tensor | slice) -> "Sampling":
        """Copy the given rows, which may repeat; of a slice return a view."""
        return Sampling(*(getattr(self, field.name)[index_N] for field in fields(self)))

    def without_top_k_and_top_p(self) -> "Sampling":
        """Return the same settings with no limit in these two."""
        no_k_R, no_p_R = torch.zeros_like(self.top_k_R), torch.ones_like(self.top_p_R)
        return Sampling(self.temperature_R, no_k_R, no_p_R, self.min_p_R, self.seed_R)


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
        logits_NV: changed as by `sample_greedy`.
        sampling: one entry per row; None: all rows are greedy.
        position_N, forward_N: as for `sample_drawn`, given with `sampling`.
        entropy_N: as for `sample_greedy`.
    """
    token_N, confidence_N = sample_greedy(logits_NV, mask_id, entropy_N)
    if sampling is not None:
        if position_N is None or forward_N is None:
            raise ValueError("drawing needs position_N and forward_N")
        drawn = (sampling.temperature_R > 0).nonzero()[:, 0]
        token_N[drawn], confidence_N[drawn] = sample_drawn(
            logits_NV[drawn],
            mask_id,
            sampling.rows(drawn),
            position_N[drawn],
            forward_N[drawn],
            None if entropy_N is None else entropy_N[drawn],
        )
    return token_N, confidence_N


def sample_greedy(
    logits_NV: Tensor, mask_id: int, entropy_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Take the most probable token of each row, the mask token excepted.

    The probability is exp(max - logsumexp): one pass, no softmax is stored. Writes -inf into the
    mask column of `logits_NV`.

    Args:
        entropy_N: bool, rows whose confidence is exp(-entropy); None: there are none.

    Returns:
        token_N (int64) and confidence_N (float32, 0 where there is no distribution).
    """
    logits_NV[:, mask_id] = -torch.inf
    top_N, token_N = logits_NV.max(dim=-1)
    # In float32: rounded to bf16, a logsumexp near 20 would be off by up to 0.06.
    confidence_N = torch.exp(top_N.float() - torch.logsumexp(logits_NV.float(), dim=-1))
    if entropy_N is not None:
        confidence_N = _by_entropy(entropy_N, logits_NV.float().softmax(-1), confidence_N)
    return token_N, confidence_N.nan_to_num_(0.0)


def _by_entropy(entropy_N: Tensor, p_NV: Tensor, confidence_N: Tensor) -> Tensor:
    """Return the confidences, replaced by exp(-entropy) of `p_NV` in the given rows."""
    return torch.where(entropy_N, (-torch.special.entr(p_NV).sum(-1)).exp(), confidence_N)


def sample_drawn(
    logits_NV: Tensor,
    mask_id: int,
    sampling: Sampling,
    position_N: Tensor,
    forward_N: Tensor,
    entropy_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row. All rows have a temperature above 0.

    Args:
        logits_NV: not changed.
        sampling: one entry per row.
        position_N, forward_N: int64, the row's position in the answer and the number of forwards
            its request has had: what makes a draw different from every other of the same seed.
        entropy_N: as for `sample_greedy`.

    Returns:
        token_N (int64) and confidence_N (float32, 0 where there is no distribution).
    """
    logits_NV = logits_NV.float().clone()
    logits_NV[:, mask_id] = -torch.inf
    logits_NV /= sampling.temperature_R[:, None]
    log_p_NV = logits_NV.log_softmax(-1)
    floor_N = log_p_NV.amax(-1) + sampling.min_p_R.log()
    log_p_NV = log_p_NV.masked_fill(log_p_NV < floor_N[:, None], -torch.inf)

    sorted_NV, token_NV = log_p_NV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(log_p_NV.shape[1], device=log_p_NV.device)
    limit_N = torch.where(sampling.top_k_R > 0, sampling.top_k_R, log_p_NV.shape[1])
    sorted_NV = sorted_NV.masked_fill(rank_V >= limit_N[:, None], -torch.inf)
    p_NV = sorted_NV.softmax(-1)
    # Keep the smallest set that reaches top_p; the best token always stays.
    drop_NV = (p_NV.cumsum(-1) - p_NV >= sampling.top_p_R[:, None]) & (rank_V > 0)
    sorted_NV = sorted_NV.masked_fill(drop_NV, -torch.inf).log_softmax(-1)

    noise_NV = gumbel(sampling.seed_R, position_N, forward_N, token_NV)
    choice_N = (sorted_NV + noise_NV).argmax(-1, keepdim=True)
    confidence_N = sorted_NV.gather(1, choice_N)[:, 0].exp()
    if entropy_N is not None:
        confidence_N = _by_entropy(entropy_N, sorted_NV.exp(), confidence_N)
    return token_NV.gather(1, choice_N)[:, 0], confidence_N.nan_to_num_(0.0)


def gumbel(seed_N: Tensor, position_N: Tensor, forward_N: Tensor, token_NV: Tensor) -> Tensor:
    """Compute Gumbel noise as a function of its arguments (int64), float32 [N, V].

    A counter-based generator: splitmix64's finaliser over (seed, position, forward, token).
    """
    key_N = _mix(_mix(_mix(seed_N) + position_N) + forward_N)
    bits_NV = _mix(key_N[:, None] + token_NV * _signed(0x9E3779B97F4A7C15))
    uniform_NV = (_shift(bits_NV, 40).double() + 0.5) / (1 << 24)
    return -torch.log(-torch.log(uniform_NV)).float()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right as if the bits were unsigned, which torch does not."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def simulated_confidence(request_N: Tensor, forward_N: Tensor, tokens_per_forward: float) -> Tensor:
    """Make up confidences with which so many positions of each request pass, left to right.

    This is for timing a model without its weights. With t tokens per forward, forward f accepts
    floor((f + 1) t) - floor(f t) positions.

    Args:
        request_N: int64, the row of each position, ascending.
        forward_N: int64, forwards its request has had.
    """
    rank_N = torch.arange(len(request_N), device=request_N.device)
    rank_N -= torch.searchsorted(request_N, request_N)
    forward_N = forward_N.double()
    quota_N = torch.floor((forward_N + 1) * tokens_per_forward)
    quota_N -= torch.floor(forward_N * tokens_per_forward)
    # Above every threshold, 1.0 included.
    return torch.where(rank_N < quota_N, 2.0, 0.0)
