# SPDX-License-Identifier: Apache-2.0
"""`D2FSampler` on CUDA: one kernel proposes, and small batches are not waited for.

Shape suffixes as in `sampler`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_d2f.kernels import confidence, missing
from vllm_d2f.kernels.rows import masked_rows, scatter
from vllm_d2f.sampler import D2FSampler

if TYPE_CHECKING:
    from vllm_d2f.model_state import D2FModelState

PADDED_ROWS = 256
"""Up to so many window positions all of them go through the language-model head, decided ones too.

The list of undecided ones alone has a length that the host must wait for. So few rows take the head
no longer than reading its weights does.
"""

LOGIT_BYTES = 512 << 20
"""Float32 logits of a chunk. Each chunk reads the weights of the head again."""


class CudaSampler(D2FSampler):
    """Same results as `D2FSampler`, without a softmax, a sort or, in small batches, a wait."""

    def __init__(self, state: "D2FModelState", base: Any) -> None:
        super().__init__(state, base)
        if reason := missing(state.device):
            raise RuntimeError(reason)
        self.rows_per_chunk = max(1, LOGIT_BYTES // (4 * state.model_config.get_vocab_size()))
        self.rows_N = torch.empty(PADDED_ROWS + 1, dtype=torch.int64, device=state.device)

    def _proposals(
        self,
        masked_DW: Tensor,
        hidden_TH: Tensor,
        slot_D: Tensor,
        begin_D: Tensor,
        first_D: Tensor,
    ) -> tuple[Tensor, Tensor]:
        positions = masked_DW.numel()
        if positions > PADDED_ROWS or self.state.proposers:
            return super()._proposals(masked_DW, hidden_TH, slot_D, begin_D, first_D)
        rows = masked_rows(masked_DW, positions, self.rows_N)
        token_N, confidence_N = self._propose(
            hidden_TH, rows.request_N, rows.column_N, slot_D, begin_D, first_D
        )
        shape = (masked_DW.shape[0], masked_DW.shape[1])
        return scatter(rows, token_N, shape), scatter(rows, confidence_N, shape)

    def _choose(self, logits_NV: Tensor, slot_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state
        if not state.drawing:
            return confidence.propose(logits_NV, state.mask_id)
        return confidence.propose(
            logits_NV,
            state.mask_id,
            state.sampling.rows(slot_N),
            state.window.start_R[slot_N] + column_N,
            state.window.forward_R[slot_N],
        )
