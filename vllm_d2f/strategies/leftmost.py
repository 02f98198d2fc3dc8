# SPDX-License-Identifier: Apache-2.0
"""Threshold, else left to right: what an active block must take is its first masked position.

The paper lets an active block that has no proposal above the threshold take its most confident
one, wherever that stands. Such a token may fit only one of several texts that the positions before
it can still become. This rule takes the first masked position instead, which depends on decoded
tokens alone. With `tau_conf` 1 it is the schedule `sequential` of SDAR (arXiv 2510.06303).
"""

import torch
from torch import Tensor

from vllm_d2f.strategies import threshold


def accept(
    confidence_RW: Tensor, block_RW: Tensor, active_RW: Tensor, tau_R1: Tensor, fewest_R1: Tensor
) -> Tensor:
    """Decide which proposals become tokens, bool [R, W]; arguments as for `threshold.accept`.

    Proposals above the threshold count towards the fewest that an active block takes.
    """
    # Those above the threshold come first in their block, then the others from left to right.
    place_RW = torch.arange(confidence_RW.shape[1], device=confidence_RW.device) - block_RW
    rank_RW = torch.where(confidence_RW > tau_R1, 1.0, 0.5 / (1 + place_RW))
    rank_RW = torch.where(confidence_RW < 0, confidence_RW, rank_RW)
    return threshold.accept(rank_RW, block_RW, active_RW, torch.full_like(tau_R1, 0.5), fewest_R1)
