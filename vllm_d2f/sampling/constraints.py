# SPDX-License-Identifier: Apache-2.0
"""Deciding a request's positions in the order of its text.

A grammar, or a bad word of several tokens, says what may come next after a text that is decided.
A request with such a constraint is decided left to right: the first undecided position takes its
token, and the next ones follow in the same forward as long as their confidence is above
`tau_conf`. Positions behind stay proposals: they keep the mask and are held.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

HELD = -1.0
"""The confidence of a position that must not be decided in this forward."""


class Constraint(Protocol):
    """What may come next, after the tokens accepted so far."""

    def forbid(self, logits_V: Tensor) -> None:
        """Write -inf, in place, over the logits of tokens that must not come next."""

    def accept(self, token: int) -> None:
        """The next token is decided."""


class BadWords:
    """Words of two and more tokens that must not stand in the answer."""

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


class LeftToRight:
    """One request's walk over its undecided positions, forward by forward."""

    def __init__(
        self, constraints: Sequence[Constraint], tau_conf: float, ends: Sequence[int]
    ) -> None:
        """The walk stops behind a token of `ends`: nothing follows it."""
        self.constraints = tuple(constraints)
        # `advance` compares in float32, and both must agree.
        self.tau_conf = float(torch.tensor(tau_conf, dtype=torch.float32))
        self.ends = frozenset(ends)
        self._first = self._going = True

    def begin(self) -> None:
        """A new forward begins."""
        self._first = self._going = True

    def walk(
        self, logits_NV: Tensor, choose: Callable[[int], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Decide the next rows of this forward, which may come in several calls.

        `d2f.advance` accepts what this accepts. A confidence above the threshold passes there
        too, and the first undecided position is always the best of a fully activated block: all
        before it is decided, and the others of its block are held unless they pass.

        Args:
            logits_NV: float32, rows in the order of the text; changed.
            choose: (row) -> its token and confidence, [1] each, from the logits of that row.

        Returns:
            token_N (int64) and confidence_N (float32), `HELD` where the walk did not come.
        """
        num_rows, device = len(logits_NV), logits_NV.device
        token_N = torch.zeros(num_rows, dtype=torch.int64, device=device)
        confidence_N = torch.full((num_rows,), HELD, dtype=torch.float32, device=device)
        for row in range(num_rows):
            if not self._going:
                break
            for constraint in self.constraints:
                constraint.forbid(logits_NV[row])
            token_1, confidence_1 = choose(row)
            token, sure = int(token_1), float(confidence_1) > self.tau_conf
            self._going = sure and token not in self.ends
            if sure or self._first:
                for constraint in self.constraints:
                    constraint.accept(token)
                token_N[row], confidence_N[row] = token_1[0], confidence_1[0]
            self._first = False
        return token_N, confidence_N
