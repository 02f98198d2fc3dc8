# SPDX-License-Identifier: Apache-2.0
"""What an engine of this process holds for its requests, and at which stage a request is."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

STAGES = (
    "waiting",
    "grammar",
    "prefill",
    "prefilled",
    "denoising",
    "streaming",
    "about to commit",
    "held back",
    "preempted",
    "finished",
)
"""Stages at which a request can be aborted.

`waiting` for a slot or pages; `grammar` is being compiled; `prefill` a chunk of the prompt is
computed and the rest is not; `prefilled` the prompt is and no block has been denoised; `denoising`
nothing has left yet; `streaming` tokens have left; `about to commit` a block in the window is
decided, the next forward commits it; `held back` the last step had no room for the window;
`preempted` pages are gone, the window waits aside; `finished` it ended in the step before.
"""

PER_REQUEST = ("Request", "Stream", "Trace", "RequestSampler", "LogprobStore", "GrammarConstraint")
"""Classes that have objects only for unfinished requests."""


@dataclass
class Inside:
    """The parts of an in-process engine (`VLLM_ENABLE_V1_MULTIPROCESSING=0`)."""

    llm: Any
    held: set[str] = field(default_factory=set)
    held_back: int = 0
    prefix_hits: int = 0

    def __post_init__(self) -> None:
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.states = self.runner.model_state.states
        self._flush()
        self.free_pages = self._free_pages()
        self.free_slots = len(self.runner.req_states.free_indices)
        self._watch_held()
        self._watch_hits()

    def internal_id(self, request_id: str) -> str | None:
        """vLLM's own id of a request of ours; None once it is over."""
        ids = self.engine.output_processor.external_req_ids.get(request_id)
        return ids[0] if ids else None

    def stage(self, request_id: str) -> str:
        """Where a request stands, one of `STAGES`."""
        from vllm.v1.request import RequestStatus

        request = self.scheduler.requests.get(self.internal_id(request_id))
        if request is None:
            return "finished"
        if request.status == RequestStatus.PREEMPTED:
            return "preempted"
        if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            return "grammar"
        if request.status != RequestStatus.RUNNING:
            return "waiting"
        stream = self.scheduler.streams[request.request_id]
        if request.is_prefill_chunk:
            return "prefill"
        if request.request_id in self.held:
            return "held back"
        if not sum(request.spec_decode_metrics.histogram):
            return "prefilled"
        if len(stream.ahead) >= stream.block_size:
            return "about to commit"
        return "streaming" if request.num_output_tokens or stream.ahead else "denoising"

    def abort(self, request_ids: list[str], *, mid_step: bool = False) -> None:
        """Abort between steps, or while the next step's forward runs."""
        if not mid_step:
            self.engine.abort_request(request_ids)
            return
        internal = self.engine.output_processor.abort_requests(request_ids, internal=False)
        self.core.aborts_queue.put_nowait(internal)

    def drain(self, on_output: Callable[[Any], None]) -> None:
        """Step until all requests are over and the worker has heard of it."""
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                on_output(output)
        self._flush()

    def _flush(self) -> None:
        """The worker hears with the next step who is over."""
        while self.scheduler.has_requests():
            self.engine.engine_core.get_output()

    def leaks(self) -> dict[str, int]:
        """What is left though no request is: by name, how many. Empty is good."""
        scheduler, states, output = self.scheduler, self.states, self.engine.output_processor
        (pages,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        req_states = self.runner.req_states
        left = {
            "pages": self.free_pages - self._free_pages(),
            "slots": self.free_slots - len(req_states.free_indices),
            "slots twice free": len(req_states.free_indices) - len(set(req_states.free_indices)),
            "requests": len(scheduler.requests),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + len(scheduler.kv_holding_waiting),
            "waiting for a grammar": len(scheduler.deferred_waiting),
            "page lists": len(pages.req_to_blocks) + len(pages.num_cached_block),
            "finished ids": len(scheduler.finished_req_ids),
            "preempted ids": len(scheduler.reset_preempted_req_ids),
            "prefills": len(scheduler._inflight_prefills),
            "streams": len(scheduler.streams),
            "traces": len(scheduler.traces),
            "slots of windows": len(states.slots),
            "windows aside": len(states.preempted),
            "request samplers": len(states.samplers),
            "drawing slots": len(states.drawing),
            "truncating slots": len(states.truncating),
            "rows by id": len(req_states.req_id_to_index),
            "resumed slots": len(states.resumed),
            "traced slots": len(states.traced),
            "unsettled": len(scheduler.unsettled),
            "outputs": len(output.request_states),
            "external ids": len(output.external_req_ids),
            "parents": len(output.parent_requests),
        }
        left |= {f"{name} objects": count for name, count in objects().items()}
        return {name: count for name, count in left.items() if count}

    def _free_pages(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def _watch_hits(self) -> None:
        """Count pages that new requests find in the prefix cache."""
        manager = self.scheduler.kv_cache_manager
        get_computed_blocks = manager.get_computed_blocks

        def watched(request: Any) -> Any:
            found = get_computed_blocks(request)
            self.prefix_hits += sum(map(len, found[0].blocks))
            return found

        manager.get_computed_blocks = watched

    def _watch_held(self) -> None:
        """Note whom each step holds back."""
        hold_back = self.scheduler._hold_back

        def watched() -> Any:
            held = hold_back()
            self.held = {request.request_id for request, window in held if window}
            self.held_back += len(self.held)
            return held

        self.scheduler._hold_back = watched


def objects() -> dict[str, int]:
    """Live objects of the `PER_REQUEST` classes, of vLLM's and ours."""
    gc.collect()
    counts = dict.fromkeys(PER_REQUEST, 0)
    for thing in gc.get_objects():
        kind = type(thing)
        if kind.__name__ in counts and kind.__module__.startswith(("vllm.v1.request", "vllm_d2f.")):
            counts[kind.__name__] += 1
    return {name: count for name, count in counts.items() if count}
