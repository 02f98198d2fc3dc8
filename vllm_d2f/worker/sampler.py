# SPDX-License-Identifier: Apache-2.0
"""After the forward: propose at the masked positions, advance the windows, say what leaves.

Two counts go back to vLLM per request: the tokens that leave (`num_sampled`), which are decided and
have nothing undecided before them, and the positions that the next forward computes again
(`num_rejected`), which are those not committed yet. Tokens leave before their block is committed.

Shape suffixes: T tokens of the forward, H hidden, D requests that denoise in this step (they lead
the batch), P that prefill, R = D + P, W window positions, N masked rows, V vocabulary.

With asynchronous scheduling a step is scheduled before the result of the one before it is known,
so the host cannot know where a window has moved to. Therefore it moves one step later for vLLM
(`lagging`): a forward begins where the window of the forward before it began. Blocks that were
committed there are computed once more, and positions behind the open blocks, which the scheduler
adds for those that may have been opened, hold masks and are not read. The window itself, and with
it every decision, is the same.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import vllm.envs as envs
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_d2f.d2f import Window, add, finish, step
from vllm_d2f.sampling.logprobs import take_all
from vllm_d2f.sampling.request_sampler import Proposer
from vllm_d2f.sampling.sample import propose_drawn, propose_greedy, simulated_confidence
from vllm_d2f.sampling.tensor_parallel import propose_sharded
from vllm_d2f.wire import NONFINITE, StepStats

if TYPE_CHECKING:
    from vllm_d2f.worker.model_state import D2FModelState

OwnRows = list[tuple[int, int, int]]
"""Slots of requests with a proposer of their own, and their rows from begin to end."""

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
        # Of the step at hand, on the host: the slots of its requests, and the positions that those
        # that denoise have in it without their prompt.
        self.slots: list[int] = []
        self.width_D = np.zeros(0, dtype=np.int32)
        # With this variable vLLM ends the engine where it finds a number in the tally's place.
        self.raise_on_nans = envs.VLLM_RAISE_ON_LOGIT_NANS
        self._resumed: list[int] = []
        # Positions by which a request's next query begins before its window.
        self.lagging: bool = state.lagging
        self.lag_S = torch.zeros(state.max_num_reqs, dtype=torch.int64, device=state.device)
        self.simulate = state.settings.simulate_tokens_per_forward
        self.project: Callable[[Tensor], Tensor] = state.project
        self.rows_per_chunk = max(1, LOGIT_BYTES // (4 * state.model_config.get_vocab_size()))
        self.rank = get_tensor_model_parallel_rank() if state.sharded else 0

    def add_request(self, req_index: int, sampling_params: Any) -> None:
        """`D2FModelState.add_request` made the window; its first forward may come at once."""
        slot = torch.full((1,), req_index, dtype=torch.int64, device=self.state.device)
        rows = self.state.window.rows(slot)
        self.lag_S[req_index] = 0
        if self.lagging:
            self.req_states.draft_tokens[req_index] = self.state.mask_id  # vLLM wrote zeros
        self._publish(slot, rows, rows.tokens_RW)
        if req_index in self.state.resumed:
            self._resumed.append(req_index)

    def apply_staged_writes(self) -> None:
        """A request that was preempted comes back with its committed tokens; more have left."""
        window = self.state.window
        for slot in self._resumed:
            known_T = self.req_states.all_token_ids.gpu[slot]
            end = window.start_R[slot] + int(self.state.prompt_len_S[slot])
            column_T = torch.arange(len(known_T), device=known_T.device) - end
            ahead_T = (column_T >= 0) & (column_T < window.lead_R[slot])
            token_T = window.tokens_RW[slot][column_T.clamp_(0, len(window.column_W) - 1)]
            known_T.copy_(torch.where(ahead_T, token_T.to(known_T.dtype), known_T))
            self.req_states.total_len.gpu[slot] += window.lead_R[slot]
        self._resumed.clear()

    def __call__(
        self, hidden_TH: Tensor, input_batch: InputBatch, draft_logits: Any = None
    ) -> SamplerOutput:
        state, device, num_reqs = self.state, hidden_TH.device, input_batch.num_reqs
        if num_reqs > state.max_num_reqs:
            # vLLM's memory profiling takes every token for a request.
            self._take_memory(hidden_TH)
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
        begin_R, end_R = async_tensor_h2d(lengths, device=device)
        slot_R = input_batch.idx_mapping

        keep_R = end_R - 1  # a prompt alone leaves the output at its last position
        if num_denoising:
            self.width_D = drafts_np[:num_denoising]
            self.slots = input_batch.idx_mapping_np.tolist()
            width_D = async_tensor_h2d(self.width_D.astype(np.int64), device=device)
            slot_D = slot_R[:num_denoising]
            # The window is the end of the query: a prompt may ride along before it.
            first_D = end_R[:num_denoising] - width_D
            if self.lagging:
                lag_D = self.lag_S[slot_D]
                first_D += lag_D
            tokens_DW, new_D, commit_D, tally_D = self._denoise(
                hidden_TH, slot_D, begin_R[:num_denoising], first_D
            )
            if self.lagging:
                stays_D = lag_D
                self.lag_S.index_copy_(0, slot_D, commit_D)
            else:
                stays_D = commit_D
            output = SamplerOutput(
                sampled_token_ids=_pad_rows(tokens_DW, num_reqs),
                logprobs_tensors=self._logprobs(new_D) if state.proposers else None,
                num_nans=_pad_rows(
                    tally_D >> NONFINITE
                    if self.raise_on_nans
                    else self._with_traces(tally_D, slot_D),
                    num_reqs,
                ),
                num_sampled=_pad_rows(new_D.int(), num_reqs),
                num_rejected=_pad_rows((width_D - stays_D).int(), num_reqs),
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

    def _take_memory(self, hidden_TH: Tensor) -> None:
        """Take what a step takes at most: one chunk of logits."""
        self.project(hidden_TH[: self.rows_per_chunk])

    def _denoise(
        self, hidden_TH: Tensor, slot_D: Tensor, begin_D: Tensor, first_D: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Propose, advance, grow, publish.

        Args:
            begin_D, first_D: rows of `hidden_TH` at which the request and its window begin.

        Returns:
            Of these requests: the tokens that leave now and how many they are, `Step.commit_R`,
            and `StepStats.pack` of the step.
        """
        state = self.state
        window = state.window.rows(slot_D)
        masked_DW = (window.column_W < window.open_R[:, None]) & ~window.decoded_RW
        proposal_DW, confidence_DW = self._proposals(masked_DW, hidden_TH, slot_D, begin_D, first_D)
        result = step(window, proposal_DW, confidence_DW, state.mask_id)
        add(window)
        if self.lagging:
            finish(window, result.done_R)
        state.window.put(slot_D, window)
        self._publish(slot_D, window, result.tokens_RW)
        column_DW = window.column_W + result.emitted_R[:, None]
        new_DW = result.tokens_RW.gather(1, column_DW.clamp_(max=len(window.column_W) - 1))
        active_D = (result.accepted_RW & result.active_RW).sum(1)
        nonfinite_D = (masked_DW & (confidence_DW == 0)).sum(1)
        semi_D = result.accepted_RW.sum(1) - active_D
        tally_D = StepStats.pack(active_D, semi_D, result.dropped_R, window.open_R, nonfinite_D)
        return new_DW, result.emit_R - result.emitted_R, result.commit_R, tally_D

    def _proposals(
        self,
        masked_DW: Tensor,
        hidden_TH: Tensor,
        slot_D: Tensor,
        begin_D: Tensor,
        first_D: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Token (int64) and confidence (float32) [D, W] at the masked positions, 0 elsewhere."""
        request_N, column_N = masked_DW.nonzero(as_tuple=True)
        token_N, confidence_N = self._propose(
            hidden_TH, request_N, column_N, slot_D, begin_D, first_D, self._own_rows(request_N)
        )
        proposal_DW = torch.zeros_like(masked_DW, dtype=torch.int64)
        confidence_DW = torch.zeros_like(masked_DW, dtype=torch.float32)
        proposal_DW[request_N, column_N] = token_N
        confidence_DW[request_N, column_N] = confidence_N
        return proposal_DW, confidence_DW

    def _propose(
        self,
        hidden_TH: Tensor,
        request_N: Tensor,
        column_N: Tensor,
        slot_D: Tensor,
        begin_D: Tensor,
        first_D: Tensor,
        own: OwnRows,
    ) -> tuple[Tensor, Tensor]:
        """Token (int64) and confidence (float32) at the given window positions, [N] each.

        Args:
            own: the rows of requests with a proposer of their own.
        """
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
        step = self.rows_per_chunk
        if state.sharded and state.drawing:
            step = max(1, step // 8)  # noise takes several times the logits' memory
        for at in range(0, len(hidden_NH), step):
            chunk = slice(at, at + step)
            project = state.project_shard if state.sharded else self.project
            choose = self._choose_sharded if state.sharded else self._choose
            logits_NV = project(hidden_NH[chunk])
            token_N[chunk], confidence_N[chunk] = choose(logits_NV, slot_N[chunk], column_N[chunk])
            for slot, begin, end in own:
                # Rows of one request are neighbours, and a chunk may end among them.
                rows = slice(max(begin, at), min(end, at + step))
                if rows.start < rows.stop:
                    if state.sharded:  # what they ask for may need whole rows
                        own_NV = self.project(hidden_NH[rows])
                    else:
                        own_NV = logits_NV[rows.start - at : rows.stop - at]
                    token_N[rows], confidence_N[rows] = state.proposers[slot].propose(
                        own_NV.float(),
                        state.window.start_R[slot] + column_N[rows],
                        state.window.forward_R[slot],
                        self._answer(slot),
                    )
        if self.simulate is not None:
            forward_N = state.window.forward_R[slot_N]
            confidence_N = simulated_confidence(request_N, forward_N, self.simulate)
        return token_N, confidence_N

    def _choose(self, logits_NV: Tensor, slot_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence of rows by their requests' sampling settings, [N] each."""
        state = self.state
        token_N, confidence_N = propose_greedy(logits_NV, state.mask_id)
        if state.drawing:
            drawn = (state.sampling.temperature_R[slot_N] > 0).nonzero()[:, 0]
            who = slot_N[drawn]
            token_N[drawn], confidence_N[drawn] = propose_drawn(
                logits_NV[drawn],
                state.mask_id,
                state.sampling.rows(who),
                state.window.start_R[who] + column_N[drawn],
                state.window.forward_R[who],
            )
        return token_N, confidence_N

    def _choose_sharded(
        self, logits_NV: Tensor, slot_N: Tensor, column_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `_choose`, with this rank's logits only."""
        state = self.state
        if not state.drawing:
            return propose_sharded(logits_NV, state.mask_id, state.first_token, gather_ranks)
        return propose_sharded(
            logits_NV,
            state.mask_id,
            state.first_token,
            gather_ranks,
            state.sampling.rows(slot_N),
            state.window.start_R[slot_N] + column_N,
            state.window.forward_R[slot_N],
            self.rank if state.cutting else None,
        )

    def _own_proposers(self) -> dict[int, Proposer]:
        """Of the requests that denoise in this step, by their place among them."""
        proposers = self.state.proposers
        if not proposers:
            return {}
        slots = self.slots[: len(self.width_D)]
        return {d: proposers[slot] for d, slot in enumerate(slots) if slot in proposers}

    def _own_rows(self, request_N: Tensor) -> OwnRows:
        """Where the rows of requests with a proposer of their own are; waits for the device."""
        own = self._own_proposers()
        if not own:
            return []
        ends = torch.arange(len(self.width_D) + 1, device=request_N.device)
        end = torch.searchsorted(request_N, ends).tolist()
        for proposer in own.values():
            proposer.begin()
        return [(self.slots[d], end[d], end[d + 1]) for d in own]

    def _answer(self, slot: int) -> Tensor | None:
        """The decided tokens of a request, and the vocabulary's size where there is none."""
        state, window = self.state, self.state.window
        if not state.proposers[slot].needs_answer:
            return None
        nothing = self.req_states.vocab_size
        known = self.req_states.all_token_ids.gpu[slot, int(state.prompt_len_S[slot]) :]
        # What follows the committed tokens may have left already; the window has it too.
        committed = torch.arange(len(known), device=known.device) < window.start_R[slot]
        return torch.cat(
            (
                torch.where(committed, known.long(), nothing),
                torch.where(window.decoded_RW[slot], window.tokens_RW[slot], nothing),
            )
        )

    def _logprobs(self, new_D: Tensor) -> LogprobsTensors | None:
        """Log-probabilities of the tokens that leave in this step, for who asked.

        How many leave is known on the device, so each request has a row per position of its query,
        and its tokens' are the first of these: vLLM reads so many as tokens have left.
        """
        own = self._own_proposers()
        stores = [own[d].logprobs if d in own else None for d in range(len(new_D))]
        if not any(stores):
            return None
        token_NK, value_NK, rank_N, begin = take_all(stores, new_D, self.width_D.tolist())
        begin += [begin[-1]] * (len(self.slots) - len(new_D))  # those that only prefill
        return LogprobsTensors(token_NK, value_NK, rank_N, begin)

    def _publish(self, slot_D: Tensor, window: Window, decided_DW: Tensor) -> None:
        """The next forward's query, where vLLM keeps draft tokens.

        The window, -1 beyond the open blocks; if `lagging`, the window before it moved, as the last
        forward decided it: what it has opened since are masks, and masks are all that follows.
        """
        drafts = self.req_states.draft_tokens
        if self.lagging:
            drafts[:, : decided_DW.shape[1]].index_copy_(0, slot_D, decided_DW)
            return
        open_DW = window.column_W < window.open_R[:, None]
        drafts.index_copy_(0, slot_D, torch.where(open_DW, window.tokens_RW, -1))

    def _with_traces(self, tally_D: Tensor, slot_D: Tensor) -> Tensor:
        """The tallies, [D]; with a request that is traced behind each the window's start and its
        tokens, [D, 2 + W]. Synchronous scheduling gets these with the next query.
        """
        window, traced = self.state.window, self.state.traced
        if not (self.lagging and traced):
            return tally_D
        rows = (tally_D[:, None], window.start_R[slot_D, None], window.tokens_RW[slot_D])
        return torch.cat(rows, dim=1)


def gather_ranks(bits_NC: Tensor) -> Tensor:
    """What each tensor-parallel rank has, int32 [P, N, C].

    They travel as float32, whose bits nobody looks at: vLLM's gather over shared memory on a CPU
    takes floating types only.
    """
    moved = tensor_model_parallel_all_gather(bits_NC.view(torch.float32), dim=0)
    return moved.view(torch.int32).view(-1, *bits_NC.shape)


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
