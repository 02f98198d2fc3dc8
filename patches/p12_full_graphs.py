# SPDX-License-Identifier: Apache-2.0
"""p12: FULL CUDA graphs for windows of every width, replayed only by steps that have their form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Patch, check_sources, replace

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

NAME = "p12_full_graphs"
CANDIDATES = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates"
BATCH = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state"


def _make_candidates(original: Callable[..., None]) -> Callable[..., None]:
    def _init_candidates(self: CudaGraphManager) -> None:
        original(self)
        from vllm.config.compilation import CUDAGraphMode

        from vllm_d2f.settings import is_d2f

        # Not whether vLLM has made one: it makes none where its only length, the canvas, exceeds
        # what is captured, and windows may be narrower.
        full = CUDAGraphMode.FULL
        wanted = self.cudagraph_mode.decode_mode() == full
        if not is_d2f(self.vllm_config.model_config) or not wanted:
            return
        mine = _descriptors(self)
        if not mine:
            return
        self._capture_descs[full] = sorted(mine, key=lambda d: d.num_tokens, reverse=True)
        # For a number of tokens: of each width the smallest graph that has room, then vLLM's own
        # piecewise ones. `dispatch` takes the first that fits.
        for key, others in self._candidates.items():
            self._candidates[key] = [d for d in others if d.cg_mode != full]
        widths = sorted({d.uniform_token_count for d in mine})
        for tokens in range(1, max((d.num_tokens for d in mine), default=0) + 1):
            fitting = [
                min(
                    (d for d in mine if d.uniform_token_count == w and d.num_tokens >= tokens),
                    key=lambda d: d.num_tokens,
                    default=None,
                )
                for w in widths
            ]
            key = (tokens, 0)
            self._candidates[key] = [d for d in fitting if d] + self._candidates.get(key, [])

    return _init_candidates


def _descriptors(manager: CudaGraphManager) -> list[Any]:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    from vllm_d2f.attention.cuda_graphs import shapes
    from vllm_d2f.settings import served_settings

    config = manager.vllm_config.model_config
    return [
        BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.FULL,
            num_tokens=shape.num_reqs * shape.width,
            num_reqs=shape.num_reqs,
            uniform_token_count=shape.width,
        )
        for shape in shapes(
            served_settings(config).params.block_size,
            config.hf_config.canvas_length,
            manager.max_num_reqs,
            manager.compilation_config.max_cudagraph_capture_size or 0,
        )
    ]


def _make_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather_batch_req_state(
        self: GPUModelRunner, scheduler_output: SchedulerOutput, dummy_run: bool
    ) -> Any:
        state, uniform = original(self, scheduler_output, dummy_run)
        if state is None or uniform is None:
            return state, uniform
        from vllm_d2f.worker.model_state import D2FModelState

        model_state = self.model_state
        if isinstance(model_state, D2FModelState) and not model_state.fits_full_graph(
            state.idx_mapping_np,
            self.req_states.num_computed_tokens_np[state.idx_mapping_np],
            state.num_scheduled_tokens,
        ):
            # "Not uniform": piecewise graphs ask for nothing else.
            uniform = None
        return state, uniform

    return gather_batch_req_state


def install() -> None:
    """Install the patch; a second call does nothing. `D2FModelState` calls it for FULL graphs."""
    check_sources(NAME, PATCH.source_sha256)
    replace(NAME, CANDIDATES, _make_candidates)
    replace(NAME, BATCH, _make_batch)


def apply() -> None:
    """Nothing yet: only a worker that captures FULL graphs needs it."""


def needed() -> bool:
    """Always: vLLM captures one query length, and asks only whether all are equal."""
    return True


PATCH = Patch(
    name=NAME,
    target=(CANDIDATES, BATCH),
    why="vLLM captures FULL graphs for one query length, the whole canvas. A D2F window is 1 to "
    "`max_blocks` blocks wide, mostly less than the canvas, and a graph fixes how many sequences "
    "attention has: equal lengths are not enough where the blocks lie elsewhere.",
    how="Wraps the list of graphs (for a D2F model: one per width and usual number of requests) "
    "and the question whether a batch is uniform (a step that is not whole blocks of the served "
    "size is not). Other models, and piecewise graphs, stay vLLM's.",
    upstream="vLLM captures several query lengths for dynamic speculative decoding only",
    remove_when="a model state can name the query lengths to capture and veto a FULL graph",
    when="always, in workers of a D2F model whose `cudagraph_mode` has FULL graphs",
    source_sha256={
        CANDIDATES: "c017d0137f301ae00e5e5ed0c4f208b572066b18b6d9f343929a048e374c3e42",
        BATCH: "18da780f3c3ffdea5e38b6d663083792796b92e8bfe2159ae16b76d0af9db7ca",
    },
    apply=apply,
    needed=needed,
    checked_late=True,
)
