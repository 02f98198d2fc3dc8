# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler for D2F: it schedules windows of open blocks where vLLM schedules draft tokens.

It differs from vLLM's scheduler in four places: how wide a window is, that the first block rides in
the forward of its prompt, that tokens are emitted before they are committed (`stream`), and which
requests may share pages (`prefix_cache`).

With async scheduling vLLM schedules a step while the step before it runs. The scheduler then does
not know which blocks that step opens or commits. It schedules a query that is wide enough for
either (`Stream.width`) and begins where the window of the running query began; `worker.sampler`
does the same on the device. So positions, pages and attention lengths are exact on the host in both
modes.

Where blocks begin at multiples of the block size from position 0, the last tokens of a prompt may
share a block with the answer: the *tail*. Each query computes the tail again, in front of the
window, until its block is committed.
"""

import time
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_d2f.scheduler.adaptive import AdaptiveWindow
from vllm_d2f.scheduler.prefix_cache import separate_pages
from vllm_d2f.scheduler.stream import Stream
from vllm_d2f.scheduler.trace import Trace
from vllm_d2f.settings import (
    request_params,
    served_settings,
    wants_adaptive_window,
    wants_trace,
)
from vllm_d2f.wire import STEP_SECONDS, DecodingStats, StepStats, send_grammar_backend


class D2FScheduler(Scheduler):
    """Schedules the open blocks of each request as its draft tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = served_settings(self.vllm_config.model_config)
        self.mask_id: int = self.vllm_config.model_config.hf_config.mask_token_id
        self.num_preempted = 0
        self.streams: dict[str, Stream] = {}
        self.traces: dict[str, Trace] = {}
        self.stats = DecodingStats()
        self._reported_open_blocks = 0
        self.async_scheduling = bool(self.scheduler_config.async_scheduling)
        # Requests that were preempted while a forward of theirs was in flight.
        self.preempted_in_flight: set[str] = set()
        self.held_back: set[str] = set()  # of this step, see `_hold_back`
        self.adaptive = AdaptiveWindow(
            getattr(self.vllm_config.model_config.hf_config, STEP_SECONDS, {}), self.mask_id
        )
        self._step_began: float | None = None  # of the step before, unless the engine was idle
        self._step_positions = 0
        # The worker keeps a window in step with its grammar (`worker.grammar`). vLLM would cut the
        # window short at its first mask token.
        self.structured_output_manager.validate_tokens = (  # type: ignore[method-assign]
            lambda request, spec_tokens: spec_tokens
        )

    def add_request(self, request: Request) -> None:
        sampling = request.sampling_params
        assert sampling is not None and sampling.max_tokens is not None
        extra_args = sampling.extra_args
        params = request_params(self.settings, extra_args)
        if request.block_hashes or self.cache_config.enable_prefix_caching:
            separate_pages(
                request, self.settings, params.block_size, self.block_size, self.hash_block_size
            )
        super().add_request(request)
        size, prompt_len = params.block_size, request.num_prompt_tokens
        tail = prompt_len % size if self.settings.block_origin == "zero" else 0
        end = params.answer_end(tail + sampling.max_tokens)
        limit = min(end - tail, self.max_model_len - prompt_len)
        adaptive = wants_adaptive_window(self.settings, extra_args)
        self.streams[request.request_id] = Stream(params, limit, size, tail, adaptive)
        self.traces.pop(request.request_id, None)  # of an aborted request with the same id
        if wants_trace(extra_args):
            self.traces[request.request_id] = Trace()
        # vLLM makes these counters only with a speculative config. They cost one list.
        request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.num_spec_tokens)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.async_scheduling:
            for request in self.running:
                if not request.is_prefill_chunk:
                    request.spec_token_ids = [-1] * self._width(request)
        whole = self._narrow()
        held_back = self._hold_back()
        self.held_back = {request.request_id for request, _ in held_back}
        pause = self._pause_state
        if self.preempted_in_flight and pause == PauseState.UNPAUSED:
            # A preempted request resumes with all its tokens, so the result of its forward in
            # flight must arrive first. It may be first in the queue, so none is admitted meanwhile.
            self._pause_state = PauseState.PAUSED_NEW
        output = super().schedule(throttle_prefills)
        self._pause_state = pause
        for request, window in (*held_back, *whole):
            scheduled = request.request_id in output.scheduled_spec_decode_tokens
            if request.status == RequestStatus.RUNNING and not scheduled:
                request.spec_token_ids = window
        self.num_preempted += len(output.preempted_req_ids or ())
        for data in output.scheduled_new_reqs:
            self._add_first_block(self.requests[data.req_id], data, output)
            if data.sampling_params is not None:
                send_grammar_backend(self.structured_output_manager, data.sampling_params)
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        windows = scheduler_output.scheduled_spec_decode_tokens
        if self.settings.block_origin == "zero":
            for req_id, scheduled in scheduler_output.num_scheduled_tokens.items():
                request = self.requests[req_id]
                end = request.num_computed_tokens - len(windows.get(req_id, ()))
                # The query holds the end of the prompt, which the next query computes again.
                if end - scheduled < request.num_prompt_tokens == end:
                    request.num_computed_tokens -= self.streams[req_id].tail
        if self.async_scheduling:
            for req_id, window in windows.items():
                request = self.requests[req_id]
                request.num_computed_tokens -= len(window)
                self._put_in_flight(request)

    def _put_in_flight(self, request: Request) -> None:
        """Account for a scheduled query. The next one may begin behind what is committed now."""
        stream = self.streams[request.request_id]
        stream.in_flight += 1
        request.num_computed_tokens += stream.commit_to(request)

    def _width(self, request: Request) -> int:
        """Return the positions of the next window of a request whose last result may be missing."""
        stream = self.streams[request.request_id]
        width = min(stream.width() - stream.tail, stream.limit - request.num_output_tokens)
        if width <= 0:
            raise _no_window(request.request_id)
        return width

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """Preempt as vLLM does, but keep the output in flight: the worker's window moves on."""
        super()._preempt_request(request, timestamp, drop_stale_output=False)
        stream = self.streams[request.request_id]
        stream.commit_to(request)
        if stream.in_flight:
            self.preempted_in_flight.add(request.request_id)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> None:
        """Make no bitmask, because the runner would apply it to hidden states."""
        return None

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the windows that the worker has prepared, each as wide as its open blocks."""
        for i, token_ids in enumerate(draft_token_ids.draft_token_ids):
            if -1 in token_ids:
                draft_token_ids.draft_token_ids[i] = token_ids[: token_ids.index(-1)]
        super().update_draft_token_ids(draft_token_ids)
        if self.adaptive.chosen:
            self._learn(draft_token_ids)
        for req_id, window in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            request = self.requests.get(req_id)
            if request is not None and req_id in self.traces:
                self.traces[req_id].record(window, request.num_output_tokens, self.mask_id)
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            if not request.spec_token_ids and not request.is_prefill_chunk:
                # vLLM would never schedule the request again, and the engine would spin.
                raise _no_window(req_id)

    def _learn(self, draft_token_ids: DraftTokenIds) -> None:
        """Report the result of its choice to the adaptive window."""
        rows = [
            (req_id, window, self.requests[req_id].num_output_tokens, self.streams[req_id].tail)
            for req_id, window in zip(
                draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
            )
            if req_id in self.requests
        ]
        if rows:
            req_ids, windows, committed, tails = zip(*rows, strict=True)
            starts = [c - t for c, t in zip(committed, tails, strict=True)]
            self.adaptive.learn(req_ids, windows, starts, tails)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Account for a forward: which tokens are emitted, and which are committed.

        vLLM assumes that the keys and values of every emitted token stay. This moves the number of
        computed tokens of each request by the difference beforehand, so that vLLM's own arithmetic
        comes out right. With async scheduling the number has stayed at the begin of the query, and
        vLLM gets back what it is about to subtract.
        """
        windows = scheduler_output.scheduled_spec_decode_tokens
        packed = model_runner_output.num_nans_in_logits or {}
        steps: dict[str, StepStats] = {}
        traced: dict[str, list[int]] = {}
        for req_id, number in packed.items():
            if isinstance(number, list):  # a trace stands behind the counters
                number, *traced[req_id] = number
            steps[req_id] = StepStats.unpack(number)
        if self.settings.simulate_tokens_per_forward is not None:
            # Simulated confidences are no probabilities, and 0 does not mean NaN there.
            steps = {req_id: stats._replace(nonfinite=0) for req_id, stats in steps.items()}
        # vLLM's own metric of corrupted requests (VLLM_COMPUTE_NANS_IN_LOGITS) reads this.
        model_runner_output.num_nans_in_logits = {r: s.nonfinite for r, s in steps.items()}
        self.stats.processed += scheduler_output.total_num_scheduled_tokens
        computed: dict[str, int] = {}
        for req_id, window in windows.items():
            request = self.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            index = model_runner_output.req_id_to_index[req_id]
            stream, step = self.streams[req_id], steps.get(req_id, StepStats())
            emitted = len(model_runner_output.sampled_token_ids[index])
            tail, committed = stream.tail, stream.commit()
            stream.open = step.open
            if self.async_scheduling:
                self._take_from_flight(request, stream, rejected=len(window) - emitted)
            else:
                request.num_computed_tokens += stream.commit_to(request) - emitted
                if request.num_computed_tokens <= 0:
                    # More tokens were emitted than a short prompt and a narrow query have
                    # positions, and vLLM subtracts from positive numbers only.
                    computed[req_id] = request.num_computed_tokens + emitted - len(window)
            self.stats.submitted += len(window)
            if req_id in self.traces:
                self.traces[req_id].forwards += 1
                if stream.adaptive:
                    self.traces[req_id].widths.append(len(window) + tail)
                if req_id in traced:
                    start, *tokens = traced[req_id]
                    self.traces[req_id].record(tokens, start, self.mask_id)
            self.stats.add(committed, emitted, step)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for req_id, number in computed.items():
            if req_id in self.requests:
                self.requests[req_id].num_computed_tokens = number
        if not self.running:
            self._step_began = None  # the next step may begin much later
        self._step_positions = scheduler_output.total_num_scheduled_tokens
        if self.traces:
            self._attach_traces(outputs)
        return outputs

    def _take_from_flight(self, request: Request, stream: Stream, rejected: int) -> None:
        """Account for the result of a query that was scheduled ahead.

        Args:
            rejected: what vLLM is about to subtract from the computed tokens of a request that was
                not preempted meanwhile.
        """
        stream.in_flight -= 1
        if request.num_stale_output_tokens:
            stream.commit_to(request)
            self.preempted_in_flight.discard(request.request_id)
            return
        request.num_computed_tokens += rejected
        if stream.in_flight:
            # The query after it began before what this one committed. The next one need not.
            request.num_computed_tokens += stream.commit_to(request)

    def _attach_traces(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Put the trace into each output, because a stop string may make any of them the last one.

        vLLM has the field for what a KV connector adds to a response. D2F models have no connector.
        """
        for output in (output for group in outputs.values() for output in group.outputs):
            trace = self.traces.get(output.request_id)
            if trace is not None:
                output.kv_transfer_params = {"d2f": trace.report(len(output.new_token_ids))}
        self.traces = {r: trace for r, trace in self.traces.items() if r in self.requests}

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Count as vLLM does, but not per position of the window: no metric shows these counts."""
        if not self.log_stats or not num_draft_tokens:
            return None
        stats = spec_decoding_stats or SpecDecodingStats(self.num_spec_tokens)
        stats.num_drafts += 1
        stats.num_draft_tokens += num_draft_tokens
        stats.num_accepted_tokens += num_accepted_tokens
        return stats

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Return vLLM's statistics, with `DecodingStats` in the fields that D2F leaves empty."""
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            self.stats = DecodingStats()  # statistics are off
            return stats
        self.stats.open_blocks = sum(s.open_blocks for s in self.streams.values())
        if self.stats.finished or self.stats.open_blocks != self._reported_open_blocks:
            # After an abort no request may be denoised for long, and the gauge must still fall.
            stats.spec_decoding_stats = stats.spec_decoding_stats or SpecDecodingStats(
                self.num_spec_tokens
            )
        if stats.spec_decoding_stats is not None:
            self._reported_open_blocks = self.stats.open_blocks
            self.stats.to_vllm(stats.spec_decoding_stats)
            self.stats = DecodingStats()
        return stats

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        stream = self.streams.pop(request.request_id, None)
        self.preempted_in_flight.discard(request.request_id)
        if stream is not None and request.spec_decode_metrics is not None:
            forwards = sum(request.spec_decode_metrics.histogram)
            self.stats.finish(request.num_output_tokens + len(stream.uncommitted), forwards)
        return super()._free_request(request, delay_free_blocks)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        stream = self.streams[request.request_id]
        committed = request.num_output_tokens
        stream.expose_uncommitted(request)
        new_token_ids, stopped = super()._update_request_with_output(
            request, new_token_ids, is_stale
        )
        if not stopped:
            stream.withdraw_uncommitted(request, committed)
        return new_token_ids, stopped

    def _narrow(self) -> list[tuple[Request, list[int]]]:
        """Let the adaptive windows of running requests go into the step in part.

        Returns:
            The requests, each with its whole window.
        """
        now = time.perf_counter()
        if self._step_began is not None:
            self.adaptive.cost.correct(self._step_positions, now - self._step_began)
        self._step_began = None
        self.adaptive.chosen = {}
        narrow = [
            (request, request.spec_token_ids)
            for request in self.running
            if request.spec_token_ids and self.streams[request.request_id].adaptive
        ]
        streams = [self.streams[request.request_id] for request, _ in narrow]
        if not any(stream.waiting_blocks > 0 for stream in streams):
            return []  # nothing to choose
        self._step_began = now
        own = sum(len(window) for _, window in narrow)
        widths = self.adaptive.choose(
            [request.request_id for request, _ in narrow],
            [window for _, window in narrow],
            [
                request.num_output_tokens - s.tail
                for (request, _), s in zip(narrow, streams, strict=True)
            ],
            [stream.block_size for stream in streams],
            [stream.tail for stream in streams],
            sum(len(request.spec_token_ids) for request in self.running) - own,
        )
        for (request, window), width in zip(narrow, widths, strict=True):
            request.spec_token_ids = window[:width]
            self.stats.withheld += len(window) - width
        return narrow

    def _hold_back(self) -> list[tuple[Request, list[int]]]:
        """Take the windows of running requests that would not fit this step's token budget.

        vLLM would cut the last window short, and a block that waits while others go on may be
        decoded differently. A request without a window skips the step; earlier ones continue.
        """
        budget = self.max_num_scheduled_tokens
        chunked = self.scheduler_config.enable_chunked_prefill
        if not chunked and len(self.running) * self.num_spec_tokens <= budget:
            return []
        held_back = []
        for request in self.running:
            need = request.num_tokens_with_spec - request.num_computed_tokens
            if request.is_prefill_chunk:
                # vLLM may cut a prompt. `_reserve_prefill_lookahead` decides again what it gets.
                need = self._whole_blocks(request, request.num_computed_tokens, min(need, budget))
            if need > budget:
                held_back.append((request, request.spec_token_ids))
                request.spec_token_ids = []
            else:
                budget -= need
        return held_back

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Let a chunk of a prompt end only where an attention block ends (a hook of vLLM).

        vLLM also asks it about requests that are held back, whose tail it would compute alone.
        """
        if request.request_id in self.held_back:
            return 0
        return self._whole_blocks(request, num_computed_tokens, num_new_tokens)

    def _whole_blocks(self, request: Request, start: int, length: int) -> int:
        """Return the longest part of a chunk that ends with a block, 0 if there is none."""
        end = start + length
        if end >= request.num_tokens:
            return length
        # A request that was preempted computes its committed blocks again like a prompt.
        begin, size = 0, self.settings.params.block_size
        if self.settings.block_origin == "zero":
            size = self.streams[request.request_id].block_size
        elif end >= request.num_prompt_tokens:
            begin, size = request.num_prompt_tokens, self.streams[request.request_id].block_size
        return max(begin + (end - begin) // size * size - start, 0)

    def _add_first_block(
        self, request: Request, data: NewRequestData, output: SchedulerOutput
    ) -> None:
        """Denoise a new request's first block in the forward that prefills its prompt.

        This saves one forward per request. Without room for the block the prompt goes alone. So
        does a request that was denoised and comes back from a preemption, because only the worker
        knows its window. One that was preempted before its first forward counts as new.
        """
        assert request.spec_decode_metrics is not None
        stream = self.streams[request.request_id]
        denoised = sum(request.spec_decode_metrics.histogram)
        scheduled = data.num_computed_tokens + output.num_scheduled_tokens[request.request_id]
        if denoised or scheduled != request.num_tokens:
            return
        width = min(stream.block_size - stream.tail, stream.limit)
        if output.total_num_scheduled_tokens + width > self.max_num_scheduled_tokens:
            return
        blocks = self.kv_cache_manager.allocate_slots(request, stream.tail + width)
        if blocks is None:
            return
        for page_ids, new in zip(data.block_ids, blocks.get_block_ids(), strict=True):
            page_ids.extend(new)
        output.num_scheduled_tokens[request.request_id] += width
        output.total_num_scheduled_tokens += width
        output.scheduled_spec_decode_tokens[request.request_id] = [-1] * width
        request.num_in_flight_tokens += width
        if self.async_scheduling:
            self._put_in_flight(request)
        else:
            request.num_computed_tokens += width


def _no_window(req_id: str) -> RuntimeError:
    return RuntimeError(
        f"vllm-d2f: request {req_id} is unfinished and has no open block. This is a bug; please "
        "report it with the request's parameters."
    )
