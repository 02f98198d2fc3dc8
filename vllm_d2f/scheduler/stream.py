# SPDX-License-Identifier: Apache-2.0
"""Tokens that leave before their block is committed, seen from the scheduler.

A decided token never changes, so it leaves as soon as everything before it is decided. Its keys and
values are final only with its block's commit, so for vLLM's bookkeeping it is no token of the
request until then: pages, prefix hashes, preemption and the next window go by committed tokens.
What left ahead of them waits here.

The scheduler need not be told what was committed. A forward commits the leading blocks that went
into it without a mask, and those are the whole blocks among the tokens that left ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Trace:
    """When a request's tokens were decided, for a request that asks (`d2f_trace`).

    Attributes:
        forwards: denoising forwards so far.
        decided: answer position -> forward that decided it, the first being 1.
        sent: tokens that left so far.
    """

    forwards: int = 0
    decided: dict[int, int] = field(default_factory=dict)
    sent: int = 0

    def see(self, window: Sequence[int], committed: int, mask_id: int) -> None:
        """The window after a forward, which begins at answer position `committed`."""
        for position, token in enumerate(window, committed):
            if token != mask_id:
                self.decided.setdefault(position, self.forwards)

    def send(self, count: int) -> dict[str, Any]:
        """`count` more tokens leave: what the answer's extra output is now."""
        for position in range(self.sent, self.sent + count):
            self.decided.setdefault(position, self.forwards)
        self.sent += count
        return {
            "forwards": self.forwards,
            # An error may end a request before its first forward.
            "tokens_per_forward": self.sent / max(self.forwards, 1),
            "decided_at": [self.decided[position] for position in range(self.sent)],
        }


@dataclass(slots=True)
class Stream:
    """One unfinished request's tokens on their way out.

    Attributes:
        block_size: positions per block.
        ahead: tokens that left and are not committed, in order.
        held: how many of these, from the first on, are committed already. They are handed over as
            soon as the next query does not begin before them (`hand_over`).
        open: positions in open blocks after the last forward that is accounted for.
        in_flight: denoising forwards that are scheduled and not accounted for.
    """

    block_size: int
    open: int
    ahead: list[int] = field(default_factory=list)
    held: int = 0
    in_flight: int = 0

    @property
    def open_blocks(self) -> int:
        """Blocks in the window, the last one maybe cut short."""
        return -(-self.open // self.block_size)

    def commit(self) -> int:
        """A forward is accounted for, its own tokens not yet: how many tokens it committed."""
        count = (len(self.ahead) - self.held) // self.block_size * self.block_size
        self.held += count
        return count

    def hand_over(self, request: "Request") -> int:
        """The request gets its committed tokens; how many they are."""
        count, self.held = self.held, 0
        if count:
            request.append_output_token_ids(self.ahead[:count])
            del self.ahead[:count]
        return count

    def width(self, max_open: int) -> int:
        """An upper bound of the positions of the next query, which begins before `held`.

        A forward opens at most one block, and what it commits leaves the window but not the query.
        A full window opens one only when it commits one, whose tokens have left by then.
        """
        known = self.held + self.open
        if self.in_flight == 0:
            return known
        whole = len(self.ahead) - self.held >= self.block_size
        return known + self.in_flight * self.block_size if whole or self.open < max_open else known

    def lend(self, request: "Request") -> None:
        """Let the request have what left ahead, for vLLM's stop checks. `take_back` ends it."""
        request._output_token_ids += self.ahead
        request._all_token_ids += self.ahead
        self.ahead = []

    def take_back(self, request: "Request", committed: int) -> None:
        """Leave `committed` output tokens to the request and keep the others.

        Page hashes may have been made of more tokens than these. They are hashes of tokens that do
        not change, and no page is filed under one before its tokens are committed.
        """
        self.ahead = request._output_token_ids[committed:]
        del request._output_token_ids[committed:]
        del request._all_token_ids[request.num_prompt_tokens + committed :]
