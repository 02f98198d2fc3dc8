# SPDX-License-Identifier: Apache-2.0
"""The trace of a request: which forward decoded each of its tokens (option `d2f_trace`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Trace:
    """When the tokens of one request were decoded.

    Attributes:
        forwards: denoising forwards so far.
        decoded_at: answer position -> the forward that decoded it; the first forward is 1.
        emitted: tokens emitted so far.
        widths: positions of the window that each forward computed, with the prompt's tail; kept
            of an adaptive window only.
    """

    forwards: int = 0
    decoded_at: dict[int, int] = field(default_factory=dict)
    emitted: int = 0
    widths: list[int] = field(default_factory=list)

    def record(self, window: Sequence[int], start: int, mask_id: int) -> None:
        """Record the window after a forward; it begins at answer position `start`."""
        for position, token in enumerate(window, start):
            if token != mask_id and position >= 0:
                self.decoded_at.setdefault(position, self.forwards)

    def report(self, count: int) -> dict[str, Any]:
        """Count `count` more emitted tokens. Return the trace as the response carries it."""
        for position in range(self.emitted, self.emitted + count):
            self.decoded_at.setdefault(position, self.forwards)
        self.emitted += count
        widths = {"widths": list(self.widths)} if self.widths else {}
        return {
            **widths,
            "forwards": self.forwards,
            # An error may end a request before its first forward.
            "tokens_per_forward": self.emitted / max(self.forwards, 1),
            "decided_at": [self.decoded_at[position] for position in range(self.emitted)],
        }
