# SPDX-License-Identifier: Apache-2.0
"""Frechet profile decoding (Fast-dLLM++, arXiv 2606.02955): accept by all confidences of a block.

With confidences c_1 >= c_2 >= ... of a block, the first n tokens are right together with a
probability of at least L_n = c_1 + ... + c_n - (n - 1), and the n-th is wrong with U_n = 1 - c_n.
The rule accepts the most tokens for which L_n - U_n is greater than the margin delta, which is
`tau_conf`. A token alone must have a probability above (1 + delta) / 2.
"""

from torch import Tensor

from vllm_d2f.strategies.profile import accept_prefix


def accept(
    confidence_RW: Tensor, block_RW: Tensor, active_RW: Tensor, tau_R1: Tensor, fewest_R1: Tensor
) -> Tensor:
    """Decide which proposals become tokens, bool [R, W]; arguments as for `threshold.accept`."""
    return accept_prefix(_risk, confidence_RW, block_RW, active_RW, tau_R1, fewest_R1)


def _risk(loss_RW: Tensor, rank_RW: Tensor, block_RW: Tensor) -> Tensor:
    """Compute 1 - (L_n - U_n): the losses of the first n tokens, and that of the n-th once more."""
    sum_RW = loss_RW.cumsum(1)
    before_RW = (sum_RW - loss_RW).gather(1, block_RW)  # the blocks before this one
    return sum_RW - before_RW + loss_RW
