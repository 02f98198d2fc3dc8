# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with D2F's differences: window widths, the first block beside the prompt, and
which prompts may share pages.
"""

import hashlib
from typing import Any

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus

from vllm_d2f.d2f import D2FParams
from vllm_d2f.settings import request_params, served_settings


class D2FScheduler(Scheduler):
    """Schedules each request's open blocks as its draft tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = served_settings(self.vllm_config.model_config)
        self.num_preempted = 0

    def add_request(self, request: Request) -> None:
        if request.block_hashes or self.cache_config.enable_prefix_caching:
            self._salt(request)
        super().add_request(request)
        # vLLM offers these counters with a speculative config only; they cost one list.
        request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.num_spec_tokens)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        held = self._hold_back()
        output = super().schedule(throttle_prefills)
        for request, window in held:
            if request.status == RequestStatus.RUNNING:
                request.spec_token_ids = window
        self.num_preempted += len(output.preempted_req_ids or ())
        for data in output.scheduled_new_reqs:
            self._add_first_block(self.requests[data.req_id], data, output)
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take over the windows the worker prepared, each as wide as its open blocks."""
        for i, token_ids in enumerate(draft_token_ids.draft_token_ids):
            if -1 in token_ids:
                draft_token_ids.draft_token_ids[i] = token_ids[: token_ids.index(-1)]
        super().update_draft_token_ids(draft_token_ids)
        for req_id in draft_token_ids.req_ids:
            request = self.requests.get(req_id)
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            if not request.spec_token_ids and not request.is_prefill_chunk:
                # It would never be scheduled again and the engine would spin without a word.
                raise RuntimeError(
                    f"vllm-d2f: request {req_id} is unfinished and has no open block. This is a "
                    "bug; please report it with the request's parameters."
                )

    def _hold_back(self) -> list[tuple[Request, list[int]]]:
        """Take the windows of running requests that would not fit this step's token budget.

        vLLM would cut the last one short, and a block that waits while others go on may be decided
        differently. Without a window a request sits out the step; earlier ones always go on.
        """
        budget = self.max_num_scheduled_tokens
        if len(self.running) * self.num_spec_tokens <= budget:
            return []
        held = []
        for request in self.running:
            need = request.num_tokens_with_spec - request.num_computed_tokens
            if need > budget:
                held.append((request, request.spec_token_ids))
                request.spec_token_ids = []
            else:
                budget -= need
        return held

    def _add_first_block(
        self, request: Request, data: NewRequestData, output: SchedulerOutput
    ) -> None:
        """Denoise a new request's first block in the forward that prefills its prompt.

        Saves one forward per request. Without room for it the prompt goes alone. A request that
        comes back from a preemption goes alone too: only the worker knows its window.
        """
        if request.num_preemptions or request.num_computed_tokens != request.num_tokens:
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
        request.num_computed_tokens += width
        request.num_in_flight_tokens += width

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
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()
