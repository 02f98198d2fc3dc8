# SPDX-License-Identifier: Apache-2.0
"""`D2FSampler` on CUDA: one kernel proposes, and the host waits for nothing.

Shape suffixes as in `sampler`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_d2f.sampling import confidence_kernel as confidence
from vllm_d2f.sampling import missing
from vllm_d2f.sampling.sample import Sampling, propose_drawn
from vllm_d2f.worker.masked_bounds import UndecidedBounds
from vllm_d2f.worker.masked_rows import masked_rows, scatter
from vllm_d2f.worker.sampler import D2FSampler

if TYPE_CHECKING:
    from vllm_d2f.worker.model_state import D2FModelState

ROWS = 16
"""The list of undecided positions is filled up to a multiple of this."""

LOGIT_BYTES = 512 << 20
"""Float32 logits of a chunk. Each chunk reads the weights of the head again."""


class CudaSampler(D2FSampler):
    """Same results as `D2FSampler`, without a softmax, a sort or a wait.

    Only a request that is decided in the order of its text (a grammar, a bad word of several
    tokens) waits: what may come next is worked out on the host.
    """

    def __init__(self, state: "D2FModelState", base: Any) -> None:
        super().__init__(state, base)
        if reason := missing(state.device):
            raise RuntimeError(reason)
        self.rows_per_chunk = max(1, LOGIT_BYTES // (4 * state.model_config.get_vocab_size()))
        positions = state.max_num_reqs * state.settings.window
        self.rows_N = torch.empty(positions + ROWS + 1, dtype=torch.int64, device=state.device)
        self.undecided = UndecidedBounds(
            state.max_num_reqs, under_way=int(self.lagging), event=torch.cuda.Event
        )

    def add_request(self, req_index: int, sampling_params: Any) -> None:
        super().add_request(req_index, sampling_params)
        state, block_size = self.state, int(self.state.block_size_S[req_index])
        known = state.settings.window if req_index in state.resumed else block_size
        self.undecided.start(req_index, known, block_size)

    def _take_memory(self, hidden_TH: Tensor) -> None:
        """One chunk of logits, and beside it a request that draws by itself, with a sort."""
        logits_NV = self.project(hidden_TH[: self.rows_per_chunk])
        own_NV = logits_NV[: self.state.settings.window].float()
        sampling = Sampling.greedy(len(own_NV), own_NV.device)
        sampling.temperature_R += 1
        propose_drawn(own_NV, self.state.mask_id, sampling, sampling.seed_R, sampling.seed_R)

    def _denoise(
        self, hidden_TH: Tensor, slot_D: Tensor, begin_D: Tensor, first_D: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = super()._denoise(hidden_TH, slot_D, begin_D, first_D)
        window = self.state.window
        open_DW = window.column_W < window.open_R[slot_D][:, None]
        undecided_D = (open_DW & ~window.decoded_RW[slot_D]).sum(1)
        self.undecided.note(self.slots[: len(self.width_D)], undecided_D)
        return out

    def _proposals(
        self,
        masked_DW: Tensor,
        hidden_TH: Tensor,
        slot_D: Tensor,
        begin_D: Tensor,
        first_D: Tensor,
    ) -> tuple[Tensor, Tensor]:
        slots = self.slots[: len(self.width_D)]
        # A query that was scheduled ahead may be wider than a window.
        width_D = np.minimum(self.width_D, masked_DW.shape[1])
        bound_D = self.undecided.bound(slots, width_D)
        proposers = self._own_proposers()
        if any(proposer.in_order is not None for proposer in proposers.values()):
            return super()._proposals(masked_DW, hidden_TH, slot_D, begin_D, first_D)
        rows = masked_rows(masked_DW, bound_D, ROWS, self.rows_N)
        end_D = bound_D.cumsum()
        # Padding among them repeats the window's first position. It is undecided like the others
        # (then the same is said twice), or its token has left and nobody asks about it any more.
        own = [(slots[d], int(end_D[d] - bound_D[d]), int(end_D[d])) for d in proposers]
        token_N, confidence_N = self._propose(
            hidden_TH, rows.request_N, rows.column_N, slot_D, begin_D, first_D, own
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
