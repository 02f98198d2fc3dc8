# SPDX-License-Identifier: Apache-2.0
"""After the forward: propose at the masked positions, advance the windows, say what is committed.

Shape suffixes: T tokens of the forward, H hidden, D requests that denoise in this step (they lead
the batch), P that prefill, R = D + P, W window positions, N masked rows, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
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
        slot = torch.tensor([req_index], device=self.state.device)
        self._publish(slot, self.state.window.rows(slot))

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(
        self, hidden_TH: Tensor, input_batch: InputBatch, draft_logits: Any = None
    ) -> SamplerOutput:
        state, device, num_reqs = self.state, hidden_TH.device, input_batch.num_reqs
        if num_reqs > state.max_num_reqs:
            # vLLM's memory profiling takes every token for a request. Its peak is one chunk's.
            self.project(hidden_TH[: self.rows_per_chunk])
            return _nothing_sampled(num_reqs, device)
        # Lengths are known on the host; what is in the windows is known on the device only.
        drafts_np = input_batch.num_draft_tokens_per_req
        num_denoising = 0 if drafts_np is None else int(np.count_nonzero(drafts_np))
        begin_np = input_batch.query_start_loc_np[:num_reqs]
        end_np = input_batch.query_start_loc_np[1 : num_reqs + 1]
        begin_R = _to_device(begin_np, device)
        keep_R = _to_device(end_np - 1, device)  # a prompt leaves the output at its last position
        slot_R = input_batch.idx_mapping

        if num_denoising:
            slot_D = slot_R[:num_denoising]
            width_np = drafts_np[:num_denoising]
            width_D = _to_device(width_np, device)
            # The window is the end of the query: a prompt may ride along before it.
            first_D = _to_device(end_np[:num_denoising] - width_np, device)
            window = state.window.rows(slot_D)
            draws = bool(state.draws_S[input_batch.idx_mapping_np[:num_denoising]].any())
            proposal_DW, confidence_DW = self._propose(
                hidden_TH, window, slot_D, begin_R[:num_denoising], first_D, draws
            )
            step = advance(window, proposal_DW, confidence_DW, state.mask_id)
            grow(window)
            state.window.put(slot_D, window)
            self._publish(slot_D, window)
            idle = num_reqs - num_denoising
            tokens_RW, sampled_R = step.tokens_RW, step.output_R
            rejected_R = width_D - sampled_R
            if idle:
                pad = torch.nn.functional.pad
                tokens_RW = pad(tokens_RW, (0, 0, 0, idle))
                sampled_R, rejected_R = pad(sampled_R, (0, idle)), pad(rejected_R, (0, idle))
            output = SamplerOutput(
                sampled_token_ids=tokens_RW,
                logprobs_tensors=None,
                num_nans=None,
                num_sampled=sampled_R.int(),
                num_rejected=rejected_R.int(),
            )
            keep_R[:num_denoising] = first_D + step.commit_R - 1
        else:
            output = _nothing_sampled(num_reqs, device)

        if state.shift:
            # Before `begin` means: nothing committed, what was kept before still holds.
            kept_RH = torch.where(
                (keep_R >= begin_R)[:, None],
                hidden_TH[keep_R.clamp(min=0)],
                state.last_hidden_SH[slot_R],
            )
            state.last_hidden_SH.index_copy_(0, slot_R, kept_RH)
        return output

    def _propose(
        self,
        hidden_TH: Tensor,
        window: Window,
        slot_D: Tensor,
        begin_D: Tensor,
        first_D: Tensor,
        draws: bool,
    ) -> tuple[Tensor, Tensor]:
        """Token and confidence at the masked positions, zeros elsewhere: int64, float32 [D, W].

        Args:
            begin_D, first_D: rows of `hidden_TH` at which the request and its window begin.
            draws: some of these requests have a temperature above 0.
        """
        state, device = self.state, hidden_TH.device
        column_W = torch.arange(window.tokens_RW.shape[1], device=device)
        masked_DW = (column_W < window.open_R[:, None]) & ~window.decided_RW
        proposal_DW = torch.zeros_like(window.tokens_RW)
        confidence_DW = torch.zeros(masked_DW.shape, dtype=torch.float32, device=device)
        request_N, column_N = masked_DW.nonzero(as_tuple=True)
        source_N = first_D[request_N] + column_N
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

    def _publish(self, slot_D: Tensor, window: Window) -> None:
        """The next forward's window, where vLLM keeps draft tokens; -1 beyond the open blocks."""
        column_W = torch.arange(window.tokens_RW.shape[1], device=slot_D.device)
        open_DW = column_W < window.open_R[:, None]
        self.req_states.draft_tokens.index_copy_(
            0, slot_D, torch.where(open_DW, window.tokens_RW, -1)
        )


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)


def _nothing_sampled(num_reqs: int, device: torch.device) -> SamplerOutput:
    zeros_R = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    return SamplerOutput(
        sampled_token_ids=zeros_R[:, None],
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=zeros_R,
        num_rejected=zeros_R,
    )
