# SPDX-License-Identifier: Apache-2.0
"""What one forward did to a request, in one integer.

The worker knows it, the metrics want it, and vLLM's runner carries one integer per request from a
sampler to the scheduler: its count of NaNs in the logits. A D2F sampler makes no logits of which
it could count them, so the integer is free; `D2FScheduler` takes it off before vLLM reads it.
"""

from typing import NamedTuple, TypeVar

from torch import Tensor

BITS = 13
"""Each count takes so many bits: a window has at most `settings.MAX_WINDOW` = 2^12 positions."""

NONFINITE = 4 * BITS
"""Bit at which the last count begins. It has what is left of an int64 and stops at its largest."""

MOST_NONFINITE = (1 << (63 - NONFINITE)) - 1

Count = TypeVar("Count", int, Tensor)


class Tally(NamedTuple):
    """Counts of one request in one forward.

    Attributes:
        active: positions decided in fully activated blocks.
        semi: positions decided in the other open blocks.
        dropped: open blocks that were given up behind an end token.
        open: positions of the window that goes into the next forward.
        nonfinite: proposals without a probability (`proposal`: NaN or infinity in the logits), at
            most `MOST_NONFINITE`.
    """

    active: int
    semi: int
    dropped: int
    open: int
    nonfinite: int


NOTHING = Tally(0, 0, 0, 0, 0)


def pack(active: Count, semi: Count, dropped: Count, open_: Count, nonfinite: Count) -> Count:
    """One integer (or an int64 tensor of them) for the counts."""
    if isinstance(nonfinite, Tensor):
        nonfinite = nonfinite.clamp(max=MOST_NONFINITE)
    else:
        nonfinite = min(nonfinite, MOST_NONFINITE)
    packed = active + (semi << BITS) + (dropped << (2 * BITS)) + (open_ << (3 * BITS))
    return packed + (nonfinite << NONFINITE)


def unpack(packed: int) -> Tally:
    """The counts in an integer of `pack`."""
    mask = (1 << BITS) - 1
    return Tally(
        active=packed & mask,
        semi=packed >> BITS & mask,
        dropped=packed >> (2 * BITS) & mask,
        open=packed >> (3 * BITS) & mask,
        nonfinite=packed >> NONFINITE,
    )
