# SPDX-License-Identifier: Apache-2.0
"""The confidence profile of a block: its confidences in order, the most confident first.

Shape suffixes: R requests, W window positions, in the columns of `order_RW`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ONE = 1 << 40
"""The probability 1 as an integer. Sums of integers do not depend on the order of summation, so a
block decides alike on every device and in a window of any width."""

Passes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(loss_RW, rank_RW, block_RW) -> a number for each position, which rises along a block."""


def order_of(confidence_RW: Tensor, block_RW: Tensor) -> Tensor:
    """Sort columns by block, then by falling confidence, then by position."""
    # One stable sort: the bits of floats that are not negative order as the floats do, and the
    # block in the upper bits leaves each block in the columns where it was.
    return ((block_RW << 32) - confidence_RW.view(torch.int32)).argsort(dim=1, stable=True)


def accept_prefix(
    risk: Passes,
    confidence_RW: Tensor,
    block_RW: Tensor,
    active_RW: Tensor,
    tau_R1: Tensor,
    fewest_R1: Tensor,
) -> Tensor:
    """Accept the longest beginning of each block's profile whose risk is below 1 - tau.

    Args:
        risk: computes the risk of accepting each position and all before it. It takes 1 - c of
            each position, in units of 1 / `ONE`, and its rank in its block, 0 for the first.
        others: as for `threshold.accept`.
    """
    order_RW = order_of(confidence_RW, block_RW)
    rank_RW = torch.arange(confidence_RW.shape[1], device=confidence_RW.device) - block_RW
    sorted_RW = confidence_RW.gather(1, order_RW)
    # Simulated and rounded confidences may be above 1.
    loss_RW = ((1 - sorted_RW.double().clamp(max=1)) * ONE).long()
    limit_R1 = ((1 - tau_R1.double()) * ONE).long()
    take_RW = risk(loss_RW, rank_RW, block_RW) < limit_R1
    take_RW |= active_RW & (rank_RW < fewest_R1)
    return take_RW.scatter(1, order_RW, take_RW) & (confidence_RW >= 0)
