# SPDX-License-Identifier: Apache-2.0
"""What one forward did to a request, in one integer.

The worker knows it, the metrics want it, and vLLM's runner carries one integer per request from a
sampler to the scheduler: its count of NaNs in the logits. A D2F sampler makes no logits of which
it could count them, so the integer is free; `D2FScheduler` takes it off before vLLM reads it.
"""

from typing import NamedTuple, TypeVar

from torch import Tensor

BITS = 16
"""Each count takes so many bits: a window has at most `settings.MAX_WINDOW` positions, so four of
them fit into an int64."""

Count = TypeVar("Count", int, Tensor)


class Tally(NamedTuple):
    """Counts of one request in one forward.

    Attributes:
        active: positions decided in fully activated blocks.
        semi: positions decided in the other open blocks.
        dropped: open blocks that were given up behind an end token.
        open: positions of the window that goes into the next forward.
    """

    active: int
    semi: int
    dropped: int
    open: int


def pack(active: Count, semi: Count, dropped: Count, open_: Count) -> Count:
    """One integer (or an int64 tensor of them) for the counts."""
    return active + (semi << BITS) + (dropped << (2 * BITS)) + (open_ << (3 * BITS))


def unpack(packed: int) -> Tally:
    """The counts in an integer of `pack`."""
    mask = (1 << BITS) - 1
    return Tally(*(packed >> shift & mask for shift in range(0, 4 * BITS, BITS)))
