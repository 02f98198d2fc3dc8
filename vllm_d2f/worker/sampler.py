# SPDX-License-Identifier: Apache-2.0
"""After the forward: step the windows, emit tokens, publish the next queries.

Two numbers go back to vLLM per request: the tokens that are emitted (`num_sampled`), which are
decoded and have no masked position before them, and the positions that the next forward computes
again (`num_rejected`), which are those not committed yet. Tokens are emitted before their block is
committed.

With asynchronous scheduling vLLM schedules a step before it knows the result of the one before, so
the host cannot know how far a window has moved. For vLLM the window therefore moves one step later:
a query begins where the window of the query before it began. The blocks that were committed there
are computed once more. The scheduler adds positions for a block that may have been opened; they
hold masks, and nothing reads them. The window itself, and with it every decision, is the same as
with synchronous scheduling.

If blocks are counted from position 0, the prompt's last tokens may share a block with the answer.
The window then begins with this tail of the prompt, as decoded positions before answer position 0.
vLLM knows them as prompt tokens: they are part of a query but not of its draft tokens.

Shape suffixes: T tokens of the forward, H hidden, D requests that denoise in this step (they come
first in the batch), P those that only prefill, R = D + P, W window positions, N masked rows, V
vocabulary.
"""

from typing import Any

import numpy as np
import torch
import vllm.envs as envs
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_d2f.d2f import Step, Window, add, finish, step
from vllm_d2f.sampling.logprobs import take_all
from vllm_d2f.wire import StepStats
from vllm_d2f.worker.proposals import Head, Proposals, Queries
from vllm_d2f.worker.request_states import RequestStates


class D2FSampler:
    """Takes the place of vLLM's sampler for D2F models.

    The runner hands it hidden states where other models have logits (`D2FModel.compute_logits`).
    """

    def __init__(
        self,
        states: RequestStates,
        model: Head,
        base: Any,
        *,
        tensor_parallel_size: int = 1,
        cuda: bool | None = None,
    ) -> None:
        """
        Args:
            base: vLLM's sampler.
            cuda: see `Proposals`.
        """
        self.states = states
        self.req_states = base.req_states
        # The runner reads these three.
        self.penalties_state = base.penalties_state
        self.sampling_states = base.sampling_states
        self.compute_nans = False
        self.proposals = Proposals(
            states,
            model,
            self.req_states.all_token_ids.gpu,
            tensor_parallel_size=tensor_parallel_size,
            cuda=cuda,
        )
        # With this variable vLLM ends the engine where it finds a number in place of the counters.
        self.raise_on_nans = envs.VLLM_RAISE_ON_LOGIT_NANS
        self.added: list[int] = []  # slots of requests whose first query is not published yet
        # Positions by which the next query begins before its window; 0 with synchronous scheduling.
        self.lag_S = torch.zeros(states.max_num_reqs, dtype=torch.int64, device=states.device)

    def add_request(self, req_index: int, sampling_params: Any) -> None:
        """Take note of a request that `RequestStates.add` has let in."""
        self.added.append(req_index)
        self.proposals.add_request(req_index)

    def apply_staged_writes(self) -> None:
        """Publish the first queries, and give vLLM the emitted tokens of resumed requests.

        Of a request that comes back from a preemption vLLM knows the committed tokens; those that
        were emitted ahead of them are in the window.
        """
        if self.added:
            added_R = async_tensor_h2d(self.added, device=self.states.device, dtype=torch.int64)
            self.added = []
            first = self.states.window.rows(added_R)
            self.lag_S.index_fill_(0, added_R, 0)
            if self.states.async_scheduling:
                # vLLM wrote zeros.
                self.req_states.draft_tokens.index_fill_(0, added_R, self.states.mask_id)
            self._publish(added_R, first, first.tokens_RW, first.start_R)
        window, req_states = self.states.window, self.req_states
        for slot in self.states.resumed:
            known_L = req_states.all_token_ids.gpu[slot]
            first = window.start_R[slot] + int(self.states.prompt_len_S[slot])
            column_L = torch.arange(len(known_L), device=known_L.device) - first
            emitted_L = (column_L >= 0) & (column_L < window.lead_R[slot])
            token_L = window.tokens_RW[slot][column_L.clamp_(0, len(window.column_W) - 1)]
            known_L.copy_(torch.where(emitted_L, token_L.to(known_L.dtype), known_L))
            tail = (-window.start_R[slot]).clamp(min=0)
            req_states.total_len.gpu[slot] += window.lead_R[slot] - tail
        self.states.resumed.clear()

    def __call__(
        self, hidden_TH: Tensor, input_batch: InputBatch, draft_logits: Any = None
    ) -> SamplerOutput:
        states, device, num_reqs = self.states, hidden_TH.device, input_batch.num_reqs
        if num_reqs > states.max_num_reqs:
            # vLLM's memory profiling takes every token for a request.
            self.proposals.reserve_memory(hidden_TH)
            return _nothing_sampled(num_reqs, device)
        # Lengths are known on the host; what is in the windows is known on the device only.
        drafts_np = input_batch.num_draft_tokens_per_req
        denoising = 0 if drafts_np is None else int((drafts_np > 0).sum())
        bounds = input_batch.query_start_loc_np
        lengths = np.stack((bounds[:num_reqs], bounds[1 : num_reqs + 1])).astype(np.int64)
        begin_R, end_R = async_tensor_h2d(lengths, device=device)
        slot_R = input_batch.idx_mapping
        output = _nothing_sampled(num_reqs, device)
        last_R = end_R - 1  # the last position whose output the next window may need
        if denoising:
            queries = self._queries(hidden_TH, input_batch, begin_R, end_R, denoising)
            result, window, nonfinite_D = self._denoise(queries, end_R[:denoising])
            new_D = result.emit_R - result.emitted_R
            column_DW = window.column_W + result.emitted_R[:, None]
            token_DW = result.tokens_RW.gather(1, column_DW.clamp_(max=len(window.column_W) - 1))
            again_D = end_R[:denoising] - queries.first_D
            if states.async_scheduling:
                self.lag_S.index_copy_(0, queries.slot_D, result.commit_R)
            else:
                again_D -= result.commit_R
            output = SamplerOutput(
                sampled_token_ids=_pad_rows(token_DW, num_reqs),
                logprobs_tensors=self._logprobs(queries, new_D, num_reqs),
                num_nans=_pad_rows(self._counters(queries, result, window, nonfinite_D), num_reqs),
                num_sampled=_pad_rows(new_D.int(), num_reqs),
                num_rejected=_pad_rows(again_D.int(), num_reqs),
            )
            last_R[:denoising] = queries.first_D + result.commit_R - 1
        if states.origin_zero and denoising < num_reqs:
            # The tail of a prompt that is complete belongs to the window: it is computed again.
            end_np = input_batch.num_computed_tokens_np + (lengths[1] - lengths[0])
            ends_R = async_tensor_h2d(end_np >= input_batch.prefill_len_np, device=device)
            tail_R = (-states.window.start_R[slot_R]).clamp(min=0) * ends_R
            output.num_rejected[denoising:] = tail_R[denoising:].int()
        if states.logits_shift:
            # A query that ends before `begin` committed nothing, and the kept output still holds.
            kept_RH = torch.where(
                (last_R >= begin_R)[:, None],
                hidden_TH[last_R.clamp(min=0)],
                states.last_hidden_SH[slot_R],
            )
            states.last_hidden_SH.index_copy_(0, slot_R, kept_RH)
        return output

    def _queries(
        self,
        hidden_TH: Tensor,
        input_batch: InputBatch,
        begin_R: Tensor,
        end_R: Tensor,
        denoising: int,
    ) -> Queries:
        """Find the windows: a window is the end of a query, and a prompt may come before it."""
        assert input_batch.num_draft_tokens_per_req is not None
        width_D = input_batch.num_draft_tokens_per_req[:denoising].astype(np.int64)
        slot_D = input_batch.idx_mapping[:denoising]
        slots = input_batch.idx_mapping_np[:denoising].tolist()
        lag_D = self.lag_S[slot_D]
        tail_D = (lag_D - self.states.window.start_R[slot_D]).clamp(min=0)
        first_D = end_R[:denoising] - async_tensor_h2d(width_D, device=end_R.device)
        samplers = self.states.samplers
        return Queries(
            hidden_TH,
            slots,
            width_D,
            slot_D,
            begin_R[:denoising],
            first_D - tail_D + lag_D,
            {d: samplers[slot] for d, slot in enumerate(slots) if slot in samplers},
        )

    def _denoise(self, queries: Queries, end_D: Tensor) -> tuple[Step, Window, Tensor]:
        """Run one iteration of the algorithm behind its forward, and publish the next query.

        Args:
            end_D: rows of `hidden_TH` at which the queries end.

        Returns:
            The step, the windows after it, and how many proposals had no distribution, [D].
        """
        states, slot_D = self.states, queries.slot_D
        window = states.window.rows(slot_D)
        start_D, masked_DW = window.start_R.clone(), window.candidate_RW
        if not states.adaptive.isdisjoint(queries.slots):
            # The query may end before the window does; what is behind it waits.
            masked_DW &= window.column_W < (end_D - queries.first_D)[:, None]
        proposal_DW, confidence_DW = self.proposals(masked_DW, queries)
        if states.adaptive:
            confidence_DW = torch.where(masked_DW, confidence_DW, -1.0)
        result = step(window, proposal_DW, confidence_DW, states.mask_id)
        add(window)
        if states.async_scheduling:
            finish(window, result.done_R)
        states.window.put(slot_D, window)
        self._publish(slot_D, window, result.tokens_RW, start_D)
        self.proposals.record(queries, window)
        return result, window, (masked_DW & (confidence_DW == 0)).sum(1)

    def _publish(self, slot_D: Tensor, window: Window, before_DW: Tensor, start_D: Tensor) -> None:
        """Write the next forward's query where vLLM keeps draft tokens.

        With synchronous scheduling this is the window, and -1 beyond its open blocks. With
        asynchronous scheduling it is the window before it moved, with what the forward decoded;
        blocks opened since are masks, and only masks follow.

        Args:
            before_DW, start_D: tokens of the window before it moved, and where it began.
        """
        drafts = self.req_states.draft_tokens
        if self.states.async_scheduling:
            token_DW, begin_D = before_DW, start_D
        else:
            open_DW = window.column_W < window.open_R[:, None]
            token_DW, begin_D = torch.where(open_DW, window.tokens_RW, -1), window.start_R
        if self.states.origin_zero:
            # Without the prompt's tail.
            filler = self.states.mask_id if self.states.async_scheduling else -1
            column_DW = window.column_W - begin_D.clamp(max=0)[:, None]
            width = len(window.column_W)
            moved_DW = token_DW.gather(1, column_DW.clamp(max=width - 1))
            token_DW = torch.where(column_DW < width, moved_DW, filler)
        drafts[:, : token_DW.shape[1]].index_copy_(0, slot_D, token_DW)

    def _counters(
        self, queries: Queries, result: Step, window: Window, nonfinite_D: Tensor
    ) -> Tensor:
        """Return what goes to the scheduler in place of NaN counts: the packed `StepStats`, [D].

        If a request has a trace, each row also has its window's start and tokens, [D, 2 + W].
        Synchronous scheduling gets these with the next query.
        """
        states = self.states
        if self.raise_on_nans:
            return nonfinite_D
        active_D = (result.accepted_RW & result.active_RW).sum(1)
        semi_D = result.accepted_RW.sum(1) - active_D
        packed_D = StepStats.pack(active_D, semi_D, result.dropped_R, window.open_R, nonfinite_D)
        if not (states.async_scheduling and states.traced):
            return packed_D
        return torch.cat((packed_D[:, None], window.start_R[:, None], window.tokens_RW), dim=1)

    def _logprobs(self, queries: Queries, new_D: Tensor, num_reqs: int) -> LogprobsTensors | None:
        """Collect the log-probabilities of the emitted tokens, for the requests that want them.

        Only the device knows how many tokens are emitted. So each of these requests has a row per
        position of its query, of which vLLM reads as many as there are emitted tokens.
        """
        samplers = queries.samplers
        stores = [samplers[d].logprobs if d in samplers else None for d in range(len(new_D))]
        if not any(stores):
            return None
        width_D = queries.width_D
        if self.states.adaptive:
            # Decoded positions behind a narrow query may be emitted with it.
            width_D = np.maximum(width_D, self.states.settings.window)
        token_NK, value_NK, rank_N, begin = take_all(stores, new_D, width_D.tolist())
        begin += [begin[-1]] * (num_reqs - len(new_D))  # those that only prefill
        return LogprobsTensors(token_NK, value_NK, rank_N, begin)


def _nothing_sampled(num_reqs: int, device: torch.device) -> SamplerOutput:
    zeros_R = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    return SamplerOutput(
        sampled_token_ids=zeros_R[:, None],
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=zeros_R,
        num_rejected=zeros_R.clone(),
    )


def _pad_rows(values: Tensor, num_rows: int) -> Tensor:
    """Append zero rows for the requests that only prefill, which come last."""
    missing = num_rows - len(values)
    if not missing:
        return values
    return torch.cat((values, values.new_zeros(missing, *values.shape[1:])))
