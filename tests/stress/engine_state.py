# SPDX-License-Identifier: Apache-2.0
"""What an engine of this process holds for its requests, and at which stage a request is."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

from stress.traffic import ENGINE_WINDOW, MODEL
from vllm.v1.request import RequestStatus

from benchmarks.parity import shut_down, start_engine

MAX_LEN, PAGE = 320, 32
"""Positions of the longest sequence and of a page, of the engines in this process."""

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
no token is emitted yet; `streaming` tokens are; `about to commit` a block in the window is decoded,
the next forward commits it; `held back` the last step had no room for the window; `preempted` pages
are gone, the window waits aside; `finished` it ended in the step before.
"""

PER_REQUEST = ("Request", "Stream", "Trace", "RequestSampler", "LogprobStore", "GrammarConstraint")
"""Classes that have objects only for unfinished requests."""


@contextlib.contextmanager
def engine(section: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """Yield an engine in this process; its memory is free afterwards.

    Args:
        section: D2F settings of the deployment beside the window.
    """
    defaults = {"block_size": 4, "max_blocks": 1, "window": ENGINE_WINDOW}
    llm = start_engine(
        MODEL,
        window=ENGINE_WINDOW,
        max_model_len=MAX_LEN,
        block_size=PAGE,
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        additional_config={"d2f": defaults | (section or {})},
        **options,
    )
    try:
        yield llm
    finally:
        shut_down(llm)


class EngineState:
    """The parts of an in-process engine (`VLLM_ENABLE_V1_MULTIPROCESSING=0`).

    Attributes:
        held: requests whose window the last step held back.
        held_back: windows held back so far.
        prefix_hits: pages that requests found in the prefix cache so far.
    """

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.states = self.runner.model_state.states
        self.held: set[str] = set()
        self.held_back = self.prefix_hits = 0
        self._flush()
        self.free_pages = self._free_pages()
        self.free_slots = len(self.runner.req_states.free_indices)
        watch(self.scheduler, "_hold_back", self._note_held)
        watch(self.scheduler.kv_cache_manager, "get_computed_blocks", self._note_hits)

    def _note_held(self, held: Any) -> None:
        self.held = {request.request_id for request, window in held if window}
        self.held_back += len(self.held)

    def _note_hits(self, found: Any) -> None:
        self.prefix_hits += sum(map(len, found[0].blocks))

    def add(self, request_id: str, ask: Any) -> None:
        """Hand in a request of `traffic`."""
        prompt: Any = {"prompt_token_ids": list(ask.prompt)}
        self.engine.add_request(request_id, prompt, ask.sampling_params())

    def stage(self, request_id: str) -> str:
        """Return where a request stands, one of `STAGES`."""
        # vLLM has an id of its own for each request, until the request is over.
        internal = self.engine.output_processor.external_req_ids.get(request_id)
        request = self.scheduler.requests.get(internal[0] if internal else None)
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
        if len(stream.uncommitted) >= stream.block_size:
            return "about to commit"
        return "streaming" if request.num_output_tokens or stream.uncommitted else "denoising"

    def abort(self, request_ids: list[str], *, mid_step: bool = False) -> None:
        """Abort between steps, or while the next step's forward runs."""
        if not mid_step:
            self.engine.abort_request(request_ids)
            return
        internal = self.engine.output_processor.abort_requests(request_ids, internal=False)
        self.core.aborts_queue.put_nowait(internal)

    def drain(self, on_output: Callable[[Any], None] = lambda output: None) -> None:
        """Step until all requests are over and the worker knows it."""
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                on_output(output)
        self._flush()

    def _flush(self) -> None:
        """Run a step, with which the worker learns which requests are over."""
        while self.scheduler.has_requests():
            self.engine.engine_core.get_output()

    def leaks(self) -> dict[str, int]:
        """Return what is left without a request: how many by name. Nothing should be."""
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
            "preempted in flight": len(scheduler.preempted_in_flight),
            "outputs": len(output.request_states),
            "external ids": len(output.external_req_ids),
            "parents": len(output.parent_requests),
        }
        left |= {f"{name} objects": count for name, count in objects().items()}
        return {name: count for name, count in left.items() if count}

    def _free_pages(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def watch(owner: Any, name: str, note: Callable[[Any], None]) -> None:
    """Hand every result of a method to `note` too, from now on."""
    method = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        note(result)
        return result

    setattr(owner, name, watched)


def objects() -> dict[str, int]:
    """Live objects of the `PER_REQUEST` classes, of vLLM's and ours."""
    gc.collect()
    counts = dict.fromkeys(PER_REQUEST, 0)
    for thing in gc.get_objects():
        kind = type(thing)
        if kind.__name__ in counts and kind.__module__.startswith(("vllm.v1.request", "vllm_d2f.")):
            counts[kind.__name__] += 1
    return {name: count for name, count in counts.items() if count}
