# SPDX-License-Identifier: Apache-2.0
"""After the forward: propose at the masked positions, advance the windows, say what is committed.

Shape suffixes: T tokens of the forward, H hidden, D requests that denoise in this step (they lead
the batch), P that prefill, R = D + P, W window positions, N masked rows, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_d2f.d2f import Window, advance, grow
from vllm_d2f.proposal import propose_drawn, propose_greedy

if TYPE_CHECKING:
    from vllm_d2f.model_state import D2FModelState

LOGIT_BYTES = 32 << 20
"""Rows go through the language-model head in chunks whose float32 logits stay under this."""


class D2FSampler:
    """Takes the place of vLLM's sampler for D2F models.

    The runner hands it hidden states where other models have logits (`D2FModel.compute_logits`).
    """

    def __init__(self, state: "D2FModelState", base: Any) -> None:
        self.state = state
        self.req_states = base.req_states
        self.penalties_state = base.penalties_state
        self.sampling_states = base.sampling_states
        self.compute_nans = False
        self.project = state.model.project
        self.rows_per_chunk = max(1, LOGIT_BYTES // (4 * state.model_config.get_vocab_size()))

    def add_request(self, req_index: int, sampling_params: Any) -> None:
        """`D2FModelState.add_request` made the window; its first forward may come at once."""
        self._publish(torch.tensor([req_index], device=self.state.device))

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(
        self, hidden_TH: Tensor, input_batch: InputBatch, draft_logits: Any = None
    ) -> SamplerOutput:
        state = self.state
        device = hidden_TH.device
        num_reqs = input_batch.num_reqs
        drafts = input_batch.num_draft_tokens_per_req
        num_denoising = 0 if drafts is None else int((drafts > 0).sum())
        slot_R = input_batch.idx_mapping
        begin_R = input_batch.query_start_loc[:num_reqs].long()
        last_R = input_batch.query_start_loc[1 : num_reqs + 1].long() - 1
        width = state.window.tokens_RW.shape[1]

        tokens_RW = torch.zeros(num_reqs, width, dtype=torch.int64, device=device)
        num_sampled_R = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        num_rejected_R = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        keep_R = last_R  # a prompt alone leaves the output at its last position

        if num_denoising:
            denoising = slice(0, num_denoising)
            slot_D = slot_R[denoising]
            window = state.window.rows(slot_D)
            width_D = torch.from_numpy(drafts[:num_denoising]).to(device, non_blocking=True).long()
            first_D = last_R[denoising] - width_D + 1  # behind a prompt that rides along
            column_W = torch.arange(width, device=device)
            present_DW = column_W < torch.minimum(window.open_R, width_D)[:, None]
            masked_DW = present_DW & ~window.decided_RW
            row_DW = first_D[:, None] + column_W
            draws = bool(state.draws_S[input_batch.idx_mapping_np[denoising]].any())
            proposal_DW, confidence_DW = self._propose(
                hidden_TH, row_DW, masked_DW, begin_R[denoising], slot_D, window, draws
            )
            step = advance(window, proposal_DW, confidence_DW, state.mask_id, width_D)
            grow(window)
            state.window.put(slot_D, window)
            tokens_RW[denoising] = step.tokens_RW
            num_sampled_R[denoising] = step.output_R.int()
            num_rejected_R[denoising] = (width_D - step.output_R).int()
            keep_R = last_R.clone()
            keep_R[denoising] = first_D + step.commit_R - 1

        if state.shift:
            state.last_hidden_SH[slot_R] = torch.where(
                (keep_R >= begin_R)[:, None],
                hidden_TH[keep_R.clamp(min=0)],
                state.last_hidden_SH[slot_R],
            )
        self._publish(slot_R)
        return SamplerOutput(
            sampled_token_ids=tokens_RW,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled_R,
            num_rejected=num_rejected_R,
        )

    def _propose(
        self,
        hidden_TH: Tensor,
        row_DW: Tensor,
        masked_DW: Tensor,
        begin_D: Tensor,
        slot_D: Tensor,
        window: Window,
        draws: bool,
    ) -> tuple[Tensor, Tensor]:
        """Token and confidence at the masked positions, zeros elsewhere: int64, float32 [D, W]."""
        state = self.state
        proposal_DW = torch.zeros_like(row_DW)
        confidence_DW = torch.zeros(row_DW.shape, dtype=torch.float32, device=row_DW.device)
        request_N, column_N = masked_DW.nonzero(as_tuple=True)
        source_N = row_DW[request_N, column_N]
        if state.shift:
            # Position i is predicted at i - 1. For the window's first one that is the last position
            # before it, whose output is kept from an earlier forward unless it is in this one.
            hidden_NH = torch.where(
                (source_N > begin_D[request_N])[:, None],
                hidden_TH[(source_N - 1).clamp(min=0)],
                state.last_hidden_SH[slot_D[request_N]],
            )
        else:
            hidden_NH = hidden_TH[source_N]
        for at in range(0, len(hidden_NH), self.rows_per_chunk):
            chunk = slice(at, at + self.rows_per_chunk)
            request, column = request_N[chunk], column_N[chunk]
            logits_NV = self.project(hidden_NH[chunk])
            token_N, confidence_N = propose_greedy(logits_NV, state.mask_id)
            if draws:
                drawn = (state.sampling.temperature_R[slot_D[request]] > 0).nonzero()[:, 0]
                who = request[drawn]
                token_N[drawn], confidence_N[drawn] = propose_drawn(
                    logits_NV[drawn],
                    state.mask_id,
                    state.sampling.rows(slot_D[who]),
                    window.start_R[who] + column[drawn],
                    window.forward_R[who],
                )
            proposal_DW[request, column] = token_N
            confidence_DW[request, column] = confidence_N
        return proposal_DW, confidence_DW

    def _publish(self, slot_R: Tensor) -> None:
        """The next forward's window, where vLLM keeps draft tokens; -1 beyond the open blocks."""
        window = self.state.window
        column_W = torch.arange(window.tokens_RW.shape[1], device=slot_R.device)
        open_RW = column_W < window.open_R[slot_R][:, None]
        self.req_states.draft_tokens[slot_R] = torch.where(open_RW, window.tokens_RW[slot_R], -1)
