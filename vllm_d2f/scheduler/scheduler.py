# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with D2F's differences: window widths, the first block beside the prompt, tokens
that leave before they are committed, and which prompts may share pages.

With asynchronous scheduling vLLM schedules a step while the one before it runs. The scheduler then
does not know which blocks that one opens or commits. It schedules a query wide enough for either
(`Stream.width`), which begins where the running one's window began; `sampler` makes the same of it
on the device. So positions, pages and attention lengths are exact on the host in both modes.
"""

import hashlib
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import StepCounts
from vllm_d2f.scheduler.prefix_cache import mark_answers
from vllm_d2f.scheduler.stream import Stream, Trace
from vllm_d2f.settings import request_params, served_settings, wants_trace
from vllm_d2f.wire import NOTHING, Tally, unpack
from vllm_d2f.worker.grammar import name_backend


class D2FScheduler(Scheduler):
    """Schedules each request's open blocks as its draft tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = served_settings(self.vllm_config.model_config)
        self.mask_id: int = self.vllm_config.model_config.hf_config.mask_token_id
        self.num_preempted = 0
        self.streams: dict[str, Stream] = {}
        self.traces: dict[str, Trace] = {}
        self.counts = StepCounts()
        self._open_blocks_told = 0
        self.run_ahead = bool(self.scheduler_config.async_scheduling)
        # Preempted requests with a forward whose result is not in.
        self.unsettled: set[str] = set()
        # The worker keeps a window in step with its grammar (`grammar`); cut short at the first
        # mask token it would be none.
        self.structured_output_manager.validate_tokens = (  # type: ignore[method-assign]
            lambda request, spec_tokens: spec_tokens
        )

    def add_request(self, request: Request) -> None:
        if request.block_hashes or self.cache_config.enable_prefix_caching:
            self._salt(request)
        super().add_request(request)
        sampling = request.sampling_params
        block_size = self._params(request).block_size
        self.streams[request.request_id] = Stream(block_size, open=block_size)
        self.traces.pop(request.request_id, None)  # of an aborted one that had the same id
        if wants_trace(sampling.extra_args if sampling else None):
            self.traces[request.request_id] = Trace()
        # vLLM offers these counters with a speculative config only; they cost one list.
        request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.num_spec_tokens)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.run_ahead:
            for request in self.running:
                if not request.is_prefill_chunk:
                    request.spec_token_ids = [-1] * self._width(request)
        held = self._hold_back()
        pause = self._pause_state
        if self.unsettled and pause == PauseState.UNPAUSED:
            # Nobody is let in before the tokens are known with which an unsettled request, which
            # may be the first in the queue, comes back.
            self._pause_state = PauseState.PAUSED_NEW
        output = super().schedule(throttle_prefills)
        self._pause_state = pause
        for request, window in held:
            if request.status == RequestStatus.RUNNING:
                request.spec_token_ids = window
        self.num_preempted += len(output.preempted_req_ids or ())
        for data in output.scheduled_new_reqs:
            self._add_first_block(self.requests[data.req_id], data, output)
            if data.sampling_params is not None:
                name_backend(self.structured_output_manager, data.sampling_params)
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if self.run_ahead:
            for req_id, window in scheduler_output.scheduled_spec_decode_tokens.items():
                request = self.requests[req_id]
                request.num_computed_tokens -= len(window)
                self._is_under_way(request)

    def _is_under_way(self, request: Request) -> None:
        """A query is scheduled; the next one may begin behind what was committed before it."""
        stream = self.streams[request.request_id]
        stream.in_flight += 1
        request.num_computed_tokens += stream.hand_over(request)

    def _width(self, request: Request) -> int:
        """Positions of a request's next query when its last one's result may not be known."""
        params, stream = self._params(request), self.streams[request.request_id]
        assert request.sampling_params is not None and request.sampling_params.max_tokens
        blocks = -(-request.sampling_params.max_tokens // stream.block_size)
        limit = min(blocks * stream.block_size, self.max_model_len - request.num_prompt_tokens)
        width = min(stream.width(params.window), limit - request.num_output_tokens)
        if width <= 0:
            raise _no_window(request.request_id)
        return width

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """vLLM's own; what is under way is never dropped: the worker's window has gone on."""
        super()._preempt_request(request, timestamp, drop_stale_output=False)
        stream = self.streams[request.request_id]
        stream.hand_over(request)
        if stream.in_flight:
            self.unsettled.add(request.request_id)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> None:
        """None: the runner would write it over hidden states. The worker has the grammar."""
        return None

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take over the windows the worker prepared, each as wide as its open blocks."""
        for i, token_ids in enumerate(draft_token_ids.draft_token_ids):
            if -1 in token_ids:
                draft_token_ids.draft_token_ids[i] = token_ids[: token_ids.index(-1)]
        super().update_draft_token_ids(draft_token_ids)
        for req_id, window in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            request = self.requests.get(req_id)
            if request is not None and req_id in self.traces:
                self.traces[req_id].see(window, request.num_output_tokens, self.mask_id)
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            if not request.spec_token_ids and not request.is_prefill_chunk:
                # It would never be scheduled again and the engine would spin without a word.
                raise _no_window(req_id)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Account for the forward: what leaves, and what is committed, which lags behind.

        vLLM takes the tokens that leave for those whose keys and values stay. Moving each request's
        count of computed tokens by the difference beforehand makes it right. Scheduling ahead, the
        count has never left the query's begin, and vLLM is given what it is about to take off.
        """
        windows = scheduler_output.scheduled_spec_decode_tokens
        packed = model_runner_output.num_nans_in_logits or {}
        tallies: dict[str, Tally] = {}
        decided: dict[str, list[int]] = {}
        for req_id, number in packed.items():
            if isinstance(number, list):  # `D2FSampler._with_traces`
                number, *decided[req_id] = number
            tallies[req_id] = unpack(number)
        if self.settings.simulate_tokens_per_forward is not None:
            # A confidence of 0 says nothing about the logits there.
            tallies = {r: tally._replace(nonfinite=0) for r, tally in tallies.items()}
        # vLLM's own metric of corrupted requests (VLLM_COMPUTE_NANS_IN_LOGITS) reads this.
        model_runner_output.num_nans_in_logits = {r: t.nonfinite for r, t in tallies.items()}
        counts = self.counts
        counts.processed += scheduler_output.total_num_scheduled_tokens
        for req_id, window in windows.items():
            request = self.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            index = model_runner_output.req_id_to_index[req_id]
            stream, tally = self.streams[req_id], tallies.get(req_id, NOTHING)
            leaving = len(model_runner_output.sampled_token_ids[index])
            committed = stream.commit()
            stream.open = tally.open
            if self.run_ahead:
                self._settle(request, stream, len(window) - leaving)
            else:
                request.num_computed_tokens += stream.hand_over(request) - leaving
            if req_id in self.traces:
                self.traces[req_id].forwards += 1
                if req_id in decided:
                    start, *tokens = decided[req_id]
                    self.traces[req_id].see(tokens, start, self.mask_id)
            counts.add(committed, leaving, tally)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.traces:
            self._attach_traces(outputs)
        return outputs

    def _settle(self, request: Request, stream: Stream, rejected: int) -> None:
        """A query that was scheduled ahead is in. vLLM will take `rejected` off the computed tokens
        of a request that was not preempted meanwhile.
        """
        stream.in_flight -= 1
        if request.num_stale_output_tokens:
            stream.hand_over(request)
            self.unsettled.discard(request.request_id)
            return
        request.num_computed_tokens += rejected
        if stream.in_flight:
            # The one after it began before what this one committed; the next one need not.
            request.num_computed_tokens += stream.hand_over(request)

    def _attach_traces(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """With every output, because a stop string found later makes any of them the last one.

        The field is vLLM's for what connectors add to a response. D2F models have none.
        """
        for output in (output for group in outputs.values() for output in group.outputs):
            trace = self.traces.get(output.request_id)
            if trace is not None:
                output.kv_transfer_params = {"d2f": trace.send(len(output.new_token_ids))}
        self.traces = {r: trace for r, trace in self.traces.items() if r in self.requests}

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """vLLM's own, without counts for each position of the window: no metric shows these."""
        if not self.log_stats or not num_draft_tokens:
            return None
        stats = spec_decoding_stats or SpecDecodingStats(self.num_spec_tokens)
        stats.num_drafts += 1
        stats.num_draft_tokens += num_draft_tokens
        stats.num_accepted_tokens += num_accepted_tokens
        return stats

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's own, with D2F's counts in the fields that the override above leaves empty."""
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            self.counts = StepCounts()  # nobody asks for them
            return stats
        self.counts.open_blocks = sum(s.open_blocks for s in self.streams.values())
        if self.counts.finished or self.counts.open_blocks != self._open_blocks_told:
            # After an abort nothing may be denoised for long, and still it is news.
            stats.spec_decoding_stats = stats.spec_decoding_stats or SpecDecodingStats(
                self.num_spec_tokens
            )
        if stats.spec_decoding_stats is not None:
            self._open_blocks_told = self.counts.open_blocks
            self.counts.put(stats.spec_decoding_stats)
            self.counts = StepCounts()
        return stats

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        stream = self.streams.pop(request.request_id, None)
        self.unsettled.discard(request.request_id)
        if stream is not None and request.spec_decode_metrics is not None:
            forwards = sum(request.spec_decode_metrics.histogram)
            self.counts.finish(request.num_output_tokens + len(stream.ahead), forwards)
        return super()._free_request(request, delay_free_blocks)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        stream = self.streams[request.request_id]
        committed = request.num_output_tokens
        stream.lend(request)
        new_token_ids, stopped = super()._update_request_with_output(
            request, new_token_ids, is_stale
        )
        if not stopped:
            stream.take_back(request, committed)
        return new_token_ids, stopped

    def _hold_back(self) -> list[tuple[Request, list[int]]]:
        """Take the windows of running requests that would not fit this step's token budget.

        vLLM would cut the last one short, and a block that waits while others go on may be decided
        differently. Without a window a request sits out the step; earlier ones always go on.
        """
        budget = self.max_num_scheduled_tokens
        chunked = self.scheduler_config.enable_chunked_prefill
        if not chunked and len(self.running) * self.num_spec_tokens <= budget:
            return []
        held = []
        for request in self.running:
            need = request.num_tokens_with_spec - request.num_computed_tokens
            if request.is_prefill_chunk:
                # A prompt may be cut; what it gets, `_reserve_prefill_lookahead` decides again.
                need = self._whole_blocks(request, request.num_computed_tokens, min(need, budget))
            if need > budget:
                held.append((request, request.spec_token_ids))
                request.spec_token_ids = []
            else:
                budget -= need
        return held

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM's hook for where a chunk of a prompt may end: only where an attention block does."""
        return self._whole_blocks(request, num_computed_tokens, num_new_tokens)

    def _whole_blocks(self, request: Request, start: int, length: int) -> int:
        """The longest part of a chunk that does not end inside a block, 0 if there is none."""
        end = start + length
        if end >= request.num_tokens:
            return length
        # A request that was preempted computes its committed blocks again like a prompt.
        begin, size = 0, self.settings.params.block_size
        if end >= request.num_prompt_tokens:
            begin, size = request.num_prompt_tokens, self.streams[request.request_id].block_size
        return max(begin + (end - begin) // size * size - start, 0)

    def _add_first_block(
        self, request: Request, data: NewRequestData, output: SchedulerOutput
    ) -> None:
        """Denoise a new request's first block in the forward that prefills its prompt.

        Saves one forward per request. Without room for it the prompt goes alone. A request that was
        denoised and comes back from a preemption goes alone too: only the worker knows its window.
        One that was not is as good as new, and may not fall behind those that are.
        """
        assert request.spec_decode_metrics is not None
        denoised = sum(request.spec_decode_metrics.histogram)
        if denoised or request.num_computed_tokens != request.num_tokens:
            return
        params = self._params(request)
        width = min(params.block_size, self.max_model_len - request.num_tokens)
        if output.total_num_scheduled_tokens + width > self.max_num_scheduled_tokens:
            return
        blocks = self.kv_cache_manager.allocate_slots(request, width)
        if blocks is None:
            return
        for held, new in zip(data.block_ids, blocks.get_block_ids(), strict=True):
            held.extend(new)
        output.num_scheduled_tokens[request.request_id] += width
        output.total_num_scheduled_tokens += width
        output.scheduled_spec_decode_tokens[request.request_id] = [-1] * width
        request.num_in_flight_tokens += width
        if self.run_ahead:
            self._is_under_way(request)
        else:
            request.num_computed_tokens += width

    def _params(self, request: Request) -> D2FParams:
        sampling = request.sampling_params
        return request_params(self.settings, sampling.extra_args if sampling else None)

    def _salt(self, request: Request) -> None:
        """Let only requests with the identical whole prompt and block size share pages.

        A bidirectional prompt's keys and values depend on all of it, and a committed block's on how
        the answer is cut into blocks.
        """
        salt = f"{request.cache_salt or ''}|d2f:{self._params(request).block_size}"
        # With a block-causal prompt a page depends on what stands before its end, if it ends with a
        # block.
        whole_blocks = self.block_size % self.settings.params.block_size == 0
        if self.settings.prompt_attention == "bidirectional" or not whole_blocks:
            tokens = ",".join(map(str, request.prompt_token_ids or ()))
            salt += "|" + hashlib.sha256(tokens.encode()).hexdigest()
        elif request._block_hasher is not None:
            request._block_hasher = mark_answers(request._block_hasher, self.hash_block_size)
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()


def _no_window(req_id: str) -> RuntimeError:
    return RuntimeError(
        f"vllm-d2f: request {req_id} is unfinished and has no open block. This is a bug; please "
        "report it with the request's parameters."
    )
