# SPDX-License-Identifier: Apache-2.0
"""p12: FULL CUDA graphs for windows of every width, replayed only for batches of their shape."""

from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, is_d2f, patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

CANDIDATES = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates"
BATCH = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state"


def has_full_graphs(config: "VllmConfig") -> bool:
    """Return whether the `cudagraph_mode` of a worker has FULL graphs."""
    mode = config.compilation_config.cudagraph_mode
    return mode is not None and mode.has_full_cudagraphs()


@patch(
    CANDIDATES,
    apply="worker",
    why="vLLM captures FULL graphs for one query length, the whole canvas. A D2F window is 1 to "
    "`max_blocks` blocks wide, mostly narrower than the canvas, and a graph fixes the number of "
    "sequences that attention sees: queries of equal length do not fit it if their blocks lie "
    "elsewhere.",
    how="The list of graphs has, for a D2F model, one per width and usual number of requests. A "
    "batch counts as uniform only if `fits_full_graph` of the model state agrees, where a model "
    "state has that method. Other models, and piecewise graphs, are vLLM's.",
    upstream="vLLM captures several query lengths for dynamic speculative decoding only",
    remove_when="a model state can name the query lengths to capture and veto a FULL graph",
    when="`cudagraph_mode` has FULL graphs",
    needed=has_full_graphs,
    written_against={CANDIDATES: "c017d0137f301ae0", BATCH: "18da780f3c3ffdea"},
)
def p12_cuda_graphs(original: Original, self: "CudaGraphManager") -> None:
    original(self)
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    from vllm_d2f.attention.cuda_graphs import shapes
    from vllm_d2f.settings import served_settings

    # The mode decides, not the graphs that vLLM has listed: it lists none if its only length, the
    # canvas, exceeds the largest size to capture, and windows may be narrower.
    model_config, full = self.vllm_config.model_config, CUDAGraphMode.FULL
    if self.cudagraph_mode.decode_mode() != full or not is_d2f(model_config):
        return
    block_size = served_settings(model_config).params.block_size
    widest = model_config.hf_config.canvas_length
    max_tokens = self.compilation_config.max_cudagraph_capture_size or 0
    graphs = [
        BatchExecutionDescriptor(
            cg_mode=full, num_tokens=num_reqs * width, num_reqs=num_reqs, uniform_token_count=width
        )
        for num_reqs, width in shapes(block_size, widest, self.max_num_reqs, max_tokens)
    ]
    if not graphs:
        return
    graphs.sort(key=lambda d: d.num_tokens, reverse=True)
    self._capture_descs[full] = graphs
    # `dispatch` takes the first candidate that fits a number of tokens: of each width the smallest
    # graph that is large enough, then vLLM's own piecewise graphs.
    for key, others in self._candidates.items():
        self._candidates[key] = [d for d in others if d.cg_mode != full]
    for tokens in range(1, graphs[0].num_tokens + 1):
        # The last graph of a width is the smallest, as the list descends.
        fitting = {d.uniform_token_count: d for d in graphs if d.num_tokens >= tokens}
        by_width = sorted(fitting.values(), key=lambda d: d.uniform_token_count or 0)
        self._candidates[tokens, 0] = by_width + self._candidates.get((tokens, 0), [])


@p12_cuda_graphs.also(BATCH)
def _uniform_batch(original: Original, self: "GPUModelRunner", *args: Any, **kwargs: Any) -> Any:
    state, uniform = original(self, *args, **kwargs)
    fits = getattr(self.model_state, "fits_full_graph", None)
    if state is None or uniform is None or fits is None:
        return state, uniform
    slots = state.idx_mapping_np
    computed = self.req_states.num_computed_tokens_np[slots]
    # None: not uniform. Piecewise graphs do not depend on it.
    return state, uniform if fits(slots, computed, state.num_scheduled_tokens) else None
