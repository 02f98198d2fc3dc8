# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of decoded tokens, kept until the tokens are emitted.

A token's log-probability comes from the forward that decoded it. It is the log-softmax of the
model's logits before the request's rules change them (`logprobs_mode` "raw_logprobs"), or the logit
itself ("raw_logits"). The mask token is no candidate, so for a greedy token it is the log of the
confidence.

Every forward writes the positions that are still masked. Once a position is decoded, no forward
writes it again, so the values of the decoding forward remain. Positions are kept in a ring as long
as the widest window.

No function here copies a value to the host, so none waits for the device.

Shape suffixes: N rows, V vocabulary, K columns (the chosen token, then the others), L ring, R
requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_d2f.window import to_device

MODES = ("raw_logprobs", "raw_logits")


class LogprobStore:
    """One request's log-probabilities, from their forward until they are emitted."""

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
        """Keep the log-probabilities of a forward.

        Args:
            logits_NV: float32, the model's logits, -inf for the mask token.
            position_N: int64, positions in the answer.
            token_N: int64, the sampled tokens.
        """
        if self.normalise:
            logits_NV = logits_NV.log_softmax(-1)
        # JSON has neither NaN nor infinity, and vLLM replaces -inf only. Without this, an answer
        # with one of the others could not be sent.
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
        """Take token_NK, value_NK and rank_N of the next tokens that are emitted.

        Args:
            count: how many tokens are emitted.
            most: number of rows to return, at least `count`; the rows behind mean nothing.
        """
        at_N = self.taken + torch.arange(most, device=self.rank_L.device)
        self.taken += count
        at_N %= self.length
        return self.token_LK[at_N], self.value_LK[at_N], self.rank_L[at_N]

    def at(self, position: int) -> float:
        """Return the value of the sampled token at an answer position of the window."""
        return float(self.value_LK[position % self.length, 0])


def take_all(
    stores: Sequence[LogprobStore | None], count_R: Tensor, most_R: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Take the log-probabilities of all tokens that one step emits.

    Args:
        stores: one per request or None; at least one request has one.
        count_R: int64, how many tokens of each request are emitted.
        most_R: upper bounds of these numbers.

    Returns:
        token_NK, value_NK and rank_N of the requests with a store, `most_R` rows each, as wide as
        the widest one and padded with token 0 at -inf; and where each request's rows begin (R + 1
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
