# SPDX-License-Identifier: Apache-2.0
"""Factor decoding (Fast-dLLM, arXiv 2505.22618): accept more if the weakest is more confident.

With confidences c_1 >= c_2 >= ... of a block, the rule accepts the most tokens for which
(n + 1) (1 - c_n) is less than the factor f. It reads f as 1 - `tau_conf`, so that a higher
`tau_conf` is stricter with every rule of probabilities, and `frechet` is the same rule where the
confidences of a block are equal.
"""

from torch import Tensor

from vllm_d2f.strategies.profile import accept_prefix


def accept(
    confidence_RW: Tensor, block_RW: Tensor, active_RW: Tensor, tau_R1: Tensor, fewest_R1: Tensor
) -> Tensor:
    """Decide which proposals become tokens, bool [R, W]; arguments as for `threshold.accept`."""
    return accept_prefix(_risk, confidence_RW, block_RW, active_RW, tau_R1, fewest_R1)


def _risk(loss_RW: Tensor, rank_RW: Tensor, block_RW: Tensor) -> Tensor:
    return loss_RW * (rank_RW + 2)  # the first position has rank 0 and n = 1
