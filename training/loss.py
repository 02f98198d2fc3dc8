# SPDX-License-Identifier: Apache-2.0
"""Losses over the masked positions.

Shapes: M masked positions, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

TAIL_WEIGHT = 0.2
"""Weight of a position behind the end token: always an end token, so soon learnt."""


def masked_cross_entropy(logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """Weighted mean of the cross-entropy with the data."""
    loss_M = F.cross_entropy(logits_MV.float(), targets_M, reduction="none")
    return (loss_M * weights_M).sum() / weights_M.sum()


def distillation(logits_MV: Tensor, teacher_logits_MV: Tensor, weights_M: Tensor) -> Tensor:
    """Weighted mean of KL(teacher || student)."""
    student_MV = F.log_softmax(logits_MV.float(), -1)
    teacher_MV = F.log_softmax(teacher_logits_MV.float(), -1)
    kl_M = (teacher_MV.exp() * (teacher_MV - student_MV)).sum(-1)
    return (kl_M * weights_M).sum() / weights_M.sum()
