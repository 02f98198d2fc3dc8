# SPDX-License-Identifier: Apache-2.0
"""`D2FSampler` on the CPU: the window update is one compiled call.

Shape suffixes as in `sampler`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_d2f.cpu_step import advance_and_grow, list_masked
from vllm_d2f.sampler import D2FSampler

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_d2f.model_state import D2FModelState


class CpuSampler(D2FSampler):
    """Same results as `D2FSampler`, without a hundred small operations a step."""

    def __init__(self, state: "D2FModelState", base: Any) -> None:
        super().__init__(state, base)
        window = state.window
        # Views: what the compiled code writes is in the tensors.
        self.tokens_SW = window.tokens_RW.numpy()
        self.decided_SW = window.decided_RW.numpy()
        self.numbers = window.numbers.numpy()
        self.tau_conf_S1 = window.tau_conf_R1.numpy()
        self.draft_SW = self.req_states.draft_tokens.numpy()
        self.request_N = np.empty(window.tokens_RW.numel(), dtype=np.int64)
        self.column_N = np.empty_like(self.request_N)
        # Compile now, not in the first request; the result is kept on disk.
        none = torch.zeros(0, dtype=torch.int64)
        self._denoise(torch.zeros(1, state.last_hidden_SH.shape[1]), none, none, none)

    def __call__(
        self, hidden_TH: Tensor, input_batch: "InputBatch", draft_logits: Any = None
    ) -> SamplerOutput:
        stale = self.state.stale_pages
        if stale is not None and not stale.seen and input_batch.num_reqs <= self.state.max_num_reqs:
            # A request's last position sees all others: what is wrong in one of its pages is wrong
            # there too, also in a prompt that no window follows yet.
            last_R = input_batch.query_start_loc_np[1 : input_batch.num_reqs + 1] - 1
            stale.seen = not bool(hidden_TH[torch.from_numpy(last_R).long()].isfinite().all())
        return super().__call__(hidden_TH, input_batch, draft_logits)

    def _denoise(
        self, hidden_TH: Tensor, slot_D: Tensor, begin_D: Tensor, first_D: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state, slot_np = self.state, slot_D.numpy()
        count = list_masked(slot_np, self.decided_SW, self.numbers, self.request_N, self.column_N)
        request_N, column_N = self.request_N[:count], self.column_N[:count]
        token_N, confidence_N = self._propose(
            hidden_TH,
            torch.from_numpy(request_N),
            torch.from_numpy(column_N),
            slot_D,
            begin_D,
            first_D,
            self._own_rows(torch.from_numpy(request_N)),
        )
        tokens_DW = torch.empty(len(slot_np), self.tokens_SW.shape[1], dtype=torch.int64)
        new_D, commit_D, tally_D = torch.empty(3, len(slot_np), dtype=torch.int64)
        advance_and_grow(
            slot_np,
            request_N,
            column_N,
            token_N.numpy(),
            confidence_N.numpy(),
            state.mask_id,
            state.window.num_ends,
            self.tokens_SW,
            self.decided_SW,
            self.numbers,
            self.tau_conf_S1,
            self.draft_SW,
            self.lagging,
            tokens_DW.numpy(),
            new_D.numpy(),
            commit_D.numpy(),
            tally_D.numpy(),
        )
        return tokens_DW, new_D, commit_D, tally_D
