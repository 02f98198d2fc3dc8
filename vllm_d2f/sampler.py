# SPDX-License-Identifier: Apache-2.0
"""After the forward: propose at the masked positions, advance the windows, say what is committed.

Shape suffixes: T tokens of the forward, H hidden, D requests that denoise in this step (they lead
the batch), P that prefill, R = D + P, W window positions, N masked rows, V vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_d2f.d2f import Window, advance, grow
from vllm_d2f.proposal import propose_drawn, propose_greedy, simulated_confidence

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
        self.simulate = state.settings.simulate_tokens_per_forward
        self.project: Callable[[Tensor], Tensor] = state.project
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
        if drafts_np is None:
            drafts_np, num_denoising = np.zeros(num_reqs, dtype=np.int32), 0
        elif input_batch.has_prefill:
            num_denoising = int((drafts_np > 0).sum())
        else:
            num_denoising = num_reqs
        lengths = np.empty((2, num_reqs), dtype=np.int64)
        lengths[0] = input_batch.query_start_loc_np[:num_reqs]
        lengths[1] = input_batch.query_start_loc_np[1 : num_reqs + 1]
        begin_R, end_R = torch.from_numpy(lengths).to(device, non_blocking=True)
        slot_R = input_batch.idx_mapping

        keep_R = end_R - 1  # a prompt alone leaves the output at its last position
        if num_denoising:
            drafts = torch.from_numpy(drafts_np[:num_denoising])
            width_D = drafts.to(device, torch.int64, non_blocking=True)
            # The window is the end of the query: a prompt may ride along before it.
            first_D = end_R[:num_denoising] - width_D
            tokens_DW, output_D, commit_D = self._denoise(
                hidden_TH, slot_R[:num_denoising], begin_R[:num_denoising], first_D
            )
            output = SamplerOutput(
                sampled_token_ids=_pad_rows(tokens_DW, num_reqs),
                logprobs_tensors=None,
                num_nans=None,
                num_sampled=_pad_rows(output_D.int(), num_reqs),
                num_rejected=_pad_rows((width_D - output_D).int(), num_reqs),
            )
            keep_R[:num_denoising] = first_D + commit_D - 1
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

    def _denoise(
        self, hidden_TH: Tensor, slot_D: Tensor, begin_D: Tensor, first_D: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Propose, advance, grow, publish.

        Args:
            begin_D, first_D: rows of `hidden_TH` at which the request and its window begin.

        Returns:
            `Step.tokens_RW`, `Step.output_R` and `Step.commit_R` of these requests.
        """
        state = self.state
        window = state.window.rows(slot_D)
        masked_DW = (window.column_W < window.open_R[:, None]) & ~window.decided_RW
        request_N, column_N = masked_DW.nonzero(as_tuple=True)
        token_N, confidence_N = self._propose(
            hidden_TH, request_N, column_N, slot_D, begin_D, first_D
        )
        proposal_DW = torch.zeros_like(window.tokens_RW)
        confidence_DW = torch.zeros_like(proposal_DW, dtype=torch.float32)
        proposal_DW[request_N, column_N] = token_N
        confidence_DW[request_N, column_N] = confidence_N
        step = advance(window, proposal_DW, confidence_DW, state.mask_id)
        grow(window)
        state.window.put(slot_D, window)
        self._publish(slot_D, window)
        return step.tokens_RW, step.output_R, step.commit_R

    def _propose(
        self,
        hidden_TH: Tensor,
        request_N: Tensor,
        column_N: Tensor,
        slot_D: Tensor,
        begin_D: Tensor,
        first_D: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Token (int64) and confidence (float32) at the given window positions, [N] each."""
        state = self.state
        slot_N, source_N = slot_D[request_N], first_D[request_N] + column_N
        if state.shift:
            # Position i is predicted at i - 1. For the window's first one that is the last position
            # before it, whose output is kept from an earlier forward unless it is in this one.
            hidden_NH = torch.where(
                (source_N > begin_D[request_N])[:, None],
                hidden_TH[(source_N - 1).clamp(min=0)],
                state.last_hidden_SH[slot_N],
            )
        else:
            hidden_NH = hidden_TH[source_N]
        token_N = torch.empty_like(column_N)
        confidence_N = torch.empty(len(column_N), dtype=torch.float32, device=column_N.device)
        for at in range(0, len(hidden_NH), self.rows_per_chunk):
            chunk = slice(at, at + self.rows_per_chunk)
            logits_NV = self.project(hidden_NH[chunk])
            token_N[chunk], confidence_N[chunk] = propose_greedy(logits_NV, state.mask_id)
            if state.drawing:
                drawn = (state.sampling.temperature_R[slot_N[chunk]] > 0).nonzero()[:, 0]
                who = slot_N[chunk][drawn]
                token_N[at + drawn], confidence_N[at + drawn] = propose_drawn(
                    logits_NV[drawn],
                    state.mask_id,
                    state.sampling.rows(who),
                    state.window.start_R[who] + column_N[chunk][drawn],
                    state.window.forward_R[who],
                )
        if self.simulate is not None:
            forward_N = state.window.forward_R[slot_N]
            confidence_N = simulated_confidence(request_N, forward_N, self.simulate)
        return token_N, confidence_N

    def _publish(self, slot_D: Tensor, window: Window) -> None:
        """The next forward's window, where vLLM keeps draft tokens; -1 beyond the open blocks."""
        open_DW = window.column_W < window.open_R[:, None]
        self.req_states.draft_tokens.index_copy_(
            0, slot_D, torch.where(open_DW, window.tokens_RW, -1)
        )


def _nothing_sampled(num_reqs: int, device: torch.device) -> SamplerOutput:
    zeros_R = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    return SamplerOutput(
        sampled_token_ids=zeros_R[:, None],
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=zeros_R,
        num_rejected=zeros_R,
    )


def _pad_rows(values: Tensor, num_rows: int) -> Tensor:
    """Zero rows for the requests that only prefill, which come last."""
    missing = num_rows - len(values)
    if not missing:
        return values
    return torch.cat((values, values.new_zeros(missing, *values.shape[1:])))
