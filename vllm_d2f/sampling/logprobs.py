# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of decided tokens, kept until the tokens leave.

A token's log-probability is that of the forward that decided it: the log-softmax of the model's
logits, before anything the request asks (`logprobs_mode` "raw_logprobs"), or these logits
("raw_logits"). The mask token is no candidate, so a greedy token's is the log of its confidence.

Every forward writes the positions that are still undecided. Once a position is decided nothing
writes it any more, so what stays is the deciding forward's. Positions live in a ring as long as
the widest window.

Nothing here brings a value to the host: what a device alone knows stays on it.

Shape suffixes: N rows, V vocabulary, K columns (the chosen token, then the others), L ring, R
requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_d2f.sampling.host_copy import to_device

MODES = ("raw_logprobs", "raw_logits")


class LogprobStore:
    """One request's log-probabilities from when they are computed until they leave."""

    def __init__(
        self,
        length: int,
        num: int,
        token_ids: Sequence[int] | None,
        mode: str,
        device: torch.device | str,
    ) -> None:
        """
        Args:
            length: positions of the widest window.
            num: most likely tokens to keep beside the chosen one.
            token_ids: keep these instead of the most likely ones.
            mode: one of `MODES`.
        """
        self.length, self.num, self.normalise = length, num, mode == "raw_logprobs"
        self.token_ids: Tensor | None = None
        if token_ids:
            self.token_ids = to_device(torch.tensor(token_ids, dtype=torch.int64), device)
            self.num = len(token_ids)
        columns = 1 + self.num
        self.token_LK = torch.zeros(length, columns, dtype=torch.int64, device=device)
        self.value_LK = torch.zeros(length, columns, dtype=torch.float32, device=device)
        self.rank_L = torch.zeros(length, dtype=torch.int64, device=device)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)

    def write(self, logits_NV: Tensor, position_N: Tensor, token_N: Tensor) -> None:
        """Note what a forward said.

        Args:
            logits_NV: float32, the model's, -inf for the mask token.
            position_N: int64, positions in the answer.
            token_N: int64, the proposed tokens.
        """
        if self.normalise:
            logits_NV = logits_NV.log_softmax(-1)
        # JSON has neither NaN nor infinity, and vLLM raises -inf only: else an answer with one
        # could not be written.
        logits_NV = logits_NV.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        chosen_N1 = logits_NV.gather(1, token_N[:, None])
        if self.token_ids is not None:
            other_NK = self.token_ids.expand(len(token_N), -1)
        else:
            other_NK = logits_NV.topk(self.num, dim=-1).indices
        at_N = position_N % self.length
        token_NK = torch.cat((token_N[:, None], other_NK), 1)
        self.token_LK[at_N] = token_NK
        self.value_LK[at_N] = logits_NV.gather(1, token_NK)
        self.rank_L[at_N] = (logits_NV >= chosen_N1).sum(-1)

    def take(self, count: int | Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the next tokens that leave: token_NK, value_NK and rank_N.

        Args:
            count: how many they are.
            most: at least `count`; there are so many rows, of which the last ones mean nothing.
        """
        at_N = self.taken + torch.arange(most, device=self.rank_L.device)
        self.taken += count
        at_N %= self.length
        return self.token_LK[at_N], self.value_LK[at_N], self.rank_L[at_N]

    def at(self, position: int) -> float:
        """The value of the chosen token at an answer position of the window."""
        return float(self.value_LK[position % self.length, 0])


def take_all(
    stores: Sequence[LogprobStore | None], count_R: Tensor, most_R: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """What leaves in one step.

    Args:
        stores: one per request, at least one of them there.
        count_R: int64, how many tokens of each request leave.
        most_R: what these are at most.

    Returns:
        token_NK, value_NK and rank_N of the requests with a store, `most_R` rows each, as wide as
        the widest and filled up with token 0 at -inf, and where each request's rows begin (R + 1
        entries).
    """
    begin, taken = [0], []
    for row, (store, most) in enumerate(zip(stores, most_R, strict=True)):
        if store is not None:
            taken.append(store.take(count_R[row], most))
        begin.append(begin[-1] + (0 if store is None else most))
    width = max(token_NK.shape[1] for token_NK, _, _ in taken)

    def widen(values_NK: Tensor, fill: float) -> Tensor:
        missing = width - values_NK.shape[1]
        return torch.nn.functional.pad(values_NK, (0, missing), value=fill)

    return (
        torch.cat([widen(token_NK, 0) for token_NK, _, _ in taken]),
        torch.cat([widen(value_NK, -torch.inf) for _, value_NK, _ in taken]),
        torch.cat([rank_N for _, _, rank_N in taken]),
        begin,
    )
