# SPDX-License-Identifier: Apache-2.0
"""Tokens that the engine emits before their block is committed.

A decoded token never changes, so the engine emits it as soon as all positions before it are
decoded. Its keys and values are final only when its block is committed. Until then vLLM must not
count it: pages, prefix hashes, preemption and the begin of the next window go by committed tokens.
A `Stream` keeps the tokens in between.

The worker need not tell the scheduler what a forward committed. A forward commits the leading
blocks that went into it without a mask, and these are the whole blocks among the emitted tokens.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_d2f.window import D2FParams


@dataclass(slots=True)
class Stream:
    """The emitted tokens of one unfinished request that are not committed yet.

    Attributes:
        params: how the request is decoded.
        limit: positions of the answer that may be decoded, in whole blocks unless the model's
            length ends before, or the last one is cut.
        open: positions of the window after the last forward whose result is in.
        tail: tokens of the prompt with which the window begins, because they share a block with
            the answer; 0 once that block is committed.
        adaptive: whether a forward may compute a part of the window (`adaptive`).
        uncommitted: emitted tokens that the request does not have yet, in order.
        committed_in_flight: positions at the begin of tail and `uncommitted` that are committed.
            The request gets their tokens when its next query begins behind them (`commit_to`).
        in_flight: denoising forwards that are scheduled and whose result is not in.
    """

    params: "D2FParams"
    limit: int
    open: int
    tail: int = 0
    adaptive: bool = False
    uncommitted: list[int] = field(default_factory=list)
    committed_in_flight: int = 0
    in_flight: int = 0

    @property
    def block_size(self) -> int:
        return self.params.block_size

    @property
    def open_blocks(self) -> int:
        """Blocks in the window, of which the last one may be cut short."""
        return -(-self.open // self.block_size)

    @property
    def waiting_blocks(self) -> int:
        """Open blocks behind that of the first masked position."""
        first_masked = self.tail + len(self.uncommitted)
        return self.open_blocks - 1 - first_masked // self.block_size

    def commit(self) -> int:
        """Account for a forward before its tokens are added. Return the positions it committed."""
        whole = self._whole_blocks()
        self.committed_in_flight += whole
        return whole

    def _whole_blocks(self) -> int:
        """Return emitted positions in whole blocks that are not committed."""
        emitted = self.tail + len(self.uncommitted) - self.committed_in_flight
        return emitted // self.block_size * self.block_size

    def commit_to(self, request: "Request") -> int:
        """Give the request its committed tokens. Return by how many positions it moves on."""
        positions, self.committed_in_flight = self.committed_in_flight, 0
        if positions:
            count = positions - self.tail
            request.append_output_token_ids(self.uncommitted[:count])
            del self.uncommitted[:count]
            self.tail = 0
        return positions

    def width(self) -> int:
        """Return an upper bound of the positions of the next query, the tail included.

        The query begins before what is committed in flight. A forward opens at most one block, and
        what it commits leaves the window but not the query. A full window opens a block only when
        it commits one, whose tokens were emitted by then.
        """
        known = self.committed_in_flight + self.open
        if self.in_flight and (self._whole_blocks() or self.open < self.params.window):
            return known + self.in_flight * self.block_size
        return known

    def expose_uncommitted(self, request: "Request") -> None:
        """Append the uncommitted tokens to the request, for vLLM's stop checks."""
        request._output_token_ids += self.uncommitted
        request._all_token_ids += self.uncommitted
        self.uncommitted = []

    def withdraw_uncommitted(self, request: "Request", committed: int) -> None:
        """Leave `committed` output tokens to the request and take the others back.

        vLLM may have hashed pages that hold tokens which are taken back. These tokens do not
        change, and no page is filed under its hash before its tokens are committed.
        """
        self.uncommitted = request._output_token_ids[committed:]
        del request._output_token_ids[committed:]
        del request._all_token_ids[request.num_prompt_tokens + committed :]
