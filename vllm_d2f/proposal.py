# SPDX-License-Identifier: Apache-2.0
"""From logits to a proposed token and its probability, row by row.

Shape suffixes: N rows (one undecided position each), V vocabulary.
"""

import torch
from torch import Tensor


def propose_greedy(logits_NV: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The most probable token of each row, the mask token excepted.

    The probability is exp(max - logsumexp): one pass, no softmax is stored. Writes -inf into the
    mask column of `logits_NV`.

    Returns:
        token_N (int64) and confidence_N (float32).
    """
    logits_NV[:, mask_id] = -torch.inf
    top_N, token_N = logits_NV.max(dim=-1)
    confidence_N = torch.exp(top_N.float() - torch.logsumexp(logits_NV, dim=-1).float())
    return token_N, confidence_N
