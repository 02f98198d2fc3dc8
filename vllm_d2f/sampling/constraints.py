# SPDX-License-Identifier: Apache-2.0
"""Decoding in the order of the text, for requests whose next token depends on the text before it.

A grammar, or a bad word of several tokens, says which tokens may follow a text that is decoded. So
a request with such a constraint is decoded from left to right: its first masked position takes a
token, and the positions after it follow in the same forward as long as their confidence is above
`tau_conf`. The positions behind them stay masked and are marked `NOT_YET`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

NOT_YET = -1.0
"""The confidence of a position that must not be decoded in this forward."""


class Constraint(Protocol):
    """Which token may come next, after the tokens accepted so far."""

    def forbid(self, logits_V: Tensor) -> None:
        """Write -inf, in place, over the logits of the tokens that must not come next."""

    def accept(self, token: int) -> None:
        """Take the next decoded token."""


class BadWords:
    """Words of two and more tokens that must not occur in the answer."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.words = [tuple(word) for word in words]
        self.tokens: list[int] = []
        self._longest = max(map(len, self.words), default=1)

    def forbid(self, logits_V: Tensor) -> None:
        tokens = tuple(self.tokens)
        for *head, last in self.words:
            if tokens[len(tokens) - len(head) :] == tuple(head):
                logits_V[last] = -torch.inf

    def accept(self, token: int) -> None:
        self.tokens = [*self.tokens, token][1 - self._longest :]


class InOrderDecoder:
    """Decodes the masked positions of one request from left to right, forward by forward."""

    def __init__(
        self, constraints: Sequence[Constraint], tau_conf: float, ends: Sequence[int]
    ) -> None:
        """
        Args:
            constraints: all of them apply to every token.
            tau_conf: the confidence above which a forward decodes more than one position, as
                `D2FParams.tau` has it.
            ends: end tokens; nothing is decoded behind one of them.
        """
        self.constraints = tuple(constraints)
        # `d2f.step` compares in float32, and both must agree.
        self.tau_conf = float(torch.tensor(tau_conf, dtype=torch.float32))
        self.ends = frozenset(ends)
        self.begin_forward()

    def begin_forward(self) -> None:
        self._first = self._going = True

    def decode_in_order(
        self, logits_NV: Tensor, sample: Callable[[int], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Decode the next rows of this forward, which may come in several calls.

        `d2f.step` then accepts exactly what this method accepts. A confidence above the threshold
        passes there too. The first masked position is always the most confident of a fully
        activated block, because all positions before it are decoded and the others of its block
        are marked `NOT_YET` unless they pass.

        Args:
            logits_NV: float32, rows in the order of the text; changed.
            sample: (row) -> its token and confidence, [1] each, from the logits of that row.

        Returns:
            token_N (int64) and confidence_N (float32), which is `NOT_YET` at positions that the
            decoding did not reach.
        """
        num_rows, device = len(logits_NV), logits_NV.device
        token_N = torch.zeros(num_rows, dtype=torch.int64, device=device)
        confidence_N = torch.full((num_rows,), NOT_YET, dtype=torch.float32, device=device)
        for row in range(num_rows):
            if not self._going:
                break
            for constraint in self.constraints:
                constraint.forbid(logits_NV[row])
            token_1, confidence_1 = sample(row)
            token, sure = int(token_1), float(confidence_1) > self.tau_conf
            self._going = sure and token not in self.ends
            if sure or self._first:
                for constraint in self.constraints:
                    constraint.accept(token)
                token_N[row], confidence_N[row] = token_1[0], confidence_1[0]
            self._first = False
        return token_N, confidence_N
