# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's ways to compute block-causal attention, for `benchmarks.attention` on CUDA."""

from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention_problem import PAGE, Problem, Run, Unavailable

WORKSPACE_BYTES = 256 << 20

JIT_VARIANT = "BlockCausalAttention"
JIT_SOURCE = """
struct BlockCausalAttention : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  float sm_scale_log2;

  template <typename Params>
  __device__ __host__ BlockCausalAttention(const Params& params, uint32_t batch_idx,
                                           uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    sm_scale_log2 = params.sm_scale * math::log2e;
  }

  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    const uint32_t block = params.block_size;
    return qo_idx < qo_len && kv_idx < kv_len &&
           kv_idx < kv_len - qo_len + (qo_idx / block + 1) * block;
  })
};
"""
"""The mask computed from positions: keys up to the end of the query's block. The window's first
query is the request's position kv_len - qo_len, and blocks begin there."""


def _flashinfer(problem: Problem) -> tuple[Any, tuple[Tensor, Tensor], Tensor]:
    if problem.query_THD.device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    if find_spec("flashinfer") is None:
        raise Unavailable("flashinfer is not installed: pip install flashinfer-python")
    import flashinfer

    return flashinfer, problem.paged, _workspace(problem.query_THD.device)


@cache
def _workspace(device: torch.device) -> Tensor:
    """One for all wrappers: they run one after another."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _indices(
    table_SP: Tensor, kv_len_S: np.ndarray, query_start_S1: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlashInfer's form of page tables: query and page offsets, pages, length of the last one."""
    count_S = -(-kv_len_S // PAGE)
    offset_S1 = np.concatenate([[0], count_S.cumsum()])
    pages = torch.cat([row[: int(n)] for row, n in zip(table_SP, count_S, strict=True)])
    last_S = (kv_len_S - 1) % PAGE + 1

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(table_SP.device)

    return put(query_start_S1), put(offset_S1), pages, put(last_S)


def _heads(problem: Problem) -> dict[str, Any]:
    layer = problem.layer
    return dict(num_qo_heads=layer.heads, num_kv_heads=layer.kv_heads, page_size=PAGE)


def _requests(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence per request: its whole window over everything."""
    case = problem.case
    lengths = np.full(case.requests, problem.length)
    return _indices(problem.pages_RP, lengths, np.arange(case.requests + 1) * case.window)


def flashinfer_virtual(problem: Problem, backend: str = "auto") -> Run:
    """One non-causal sequence per block.

    Args:
        backend: "fa2", "fa3" (Hopper), "auto": the better one of the device.
    """
    flashinfer, cache_, workspace = _flashinfer(problem)
    if backend == "fa3" and torch.cuda.get_device_capability(problem.query_THD.device) != (9, 0):
        raise Unavailable("FlashInfer's fa3 kernels are for compute capability 9.0")
    sequences = problem.sequences()
    table_SP = problem.pages_RP[torch.from_numpy(sequences.request_S).to(problem.pages_RP.device)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
    wrapper.plan(
        *_indices(table_SP, sequences.kv_len_S, sequences.query_start_S1),
        head_dim_qk=problem.layer.head_dim,
        causal=False,
        q_data_type=problem.query_THD.dtype,
        **_heads(problem),
    )
    return lambda: wrapper.run(problem.query_THD, cache_)


flashinfer_fa2 = partial(flashinfer_virtual, backend="fa2")
flashinfer_fa3 = partial(flashinfer_virtual, backend="fa3")


def flashinfer_mask(problem: Problem) -> Run:
    """One sequence per request and a custom mask."""
    flashinfer, cache_, workspace = _flashinfer(problem)
    case = problem.case
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *_requests(problem),
        head_dim_qk=problem.layer.head_dim,
        custom_mask=problem.mask_WL().flatten().repeat(case.requests),
        q_data_type=problem.query_THD.dtype,
        **_heads(problem),
    )
    return lambda: wrapper.run(problem.query_THD, cache_)


def flashinfer_jit(problem: Problem) -> Run:
    """One sequence per request, the mask computed in the kernel."""
    flashinfer, cache_, workspace = _flashinfer(problem)
    size, dtype = problem.layer.head_dim, problem.query_THD.dtype
    name = f"d2f_block_causal_{str(dtype).removeprefix('torch.')}_{size}"
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        backend="fa2",
        jit_args=[
            name,
            *(dtype, dtype, dtype, torch.int32, size, size),
            *([], []),
            *(["sm_scale", "block_size"], ["double", "int64_t"]),
            *(JIT_VARIANT, JIT_SOURCE),
        ],
        jit_kwargs={"module_surface": "paged"},
        variant_owns_mask=True,
    )
    wrapper.plan(*_requests(problem), head_dim_qk=size, q_data_type=dtype, **_heads(problem))
    block = problem.case.block_size
    return lambda: wrapper.run(problem.query_THD, cache_, size**-0.5, block)


def flashinfer_cascade(problem: Problem) -> Run:
    """The context once per request, then the window per block, merged by their softmax sums.

    Levels meet at the last page boundary of the context: what is behind it belongs to the window.
    """
    case = problem.case
    shared = case.context // PAGE * PAGE
    flashinfer, cache_, workspace = _flashinfer(problem)
    if not shared:
        raise Unavailable(f"contexts must have at least {PAGE} positions")
    levels = cascade_levels(problem)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        *(list(pair) for pair in zip(*levels, strict=True)),
        head_dim=problem.layer.head_dim,
        causal=False,
        q_data_type=problem.query_THD.dtype,
        **_heads(problem),
    )
    return lambda: wrapper.run(problem.query_THD, cache_)


def cascade_levels(problem: Problem) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Page lists of the two levels: the context's whole pages, and what follows them."""
    case, sequences = problem.case, problem.sequences()
    shared = case.context // PAGE * PAGE
    request_S = torch.from_numpy(sequences.request_S).to(problem.pages_RP.device)
    window_SP = problem.pages_RP[request_S, shared // PAGE :]
    lengths = np.full(case.requests, shared)
    return [
        _indices(problem.pages_RP, lengths, np.arange(case.requests + 1) * case.window),
        _indices(window_SP, sequences.kv_len_S - shared, sequences.query_start_S1),
    ]
