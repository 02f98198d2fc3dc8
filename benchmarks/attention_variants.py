# SPDX-License-Identifier: Apache-2.0
"""The same block-causal attention, computed in several ways, for `benchmarks.attention`.

A variant is set up once per step (index arithmetic, masks, plans) and returns what one layer runs.

Shape suffixes: R requests, T = R * W query tokens, W window positions, L context + window, H query
heads, K key heads, D head size, S virtual sequences, P pages of B positions.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_problem import PAGE, Problem, Run, Unavailable, cpu_isa


def virtual(problem: Problem) -> Run:
    """What the engine runs: one non-causal sequence per block on vLLM's paged kernel."""
    on_cpu = problem.query_THD.device.type == "cpu"
    return _virtual_cpu(problem) if on_cpu else flashinfer_virtual(problem)


def _virtual_cpu(problem: Problem) -> Run:
    from vllm import _custom_ops as ops

    layer, query = problem.layer, problem.query_THD
    sequences = problem.sequences()
    start_S1 = torch.from_numpy(sequences.query_start_S1)
    kv_len_S = torch.from_numpy(sequences.kv_len_S)
    table_SP = problem.pages_RP[torch.from_numpy(sequences.request_S)]
    isa = cpu_isa(layer, query.dtype)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(kv_len_S),
        num_heads=layer.heads,
        num_kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        seq_lens=kv_len_S,
        dtype=query.dtype,
        query_start_loc=start_S1,
        causal=False,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    key_cache, value_cache = problem.cpu_paged
    out = torch.empty_like(query)

    def run() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=start_S1,
            seq_lens=kv_len_S,
            scale=layer.head_dim**-0.5,
            causal=False,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table_SP,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )
        return out

    return run


def sdpa(problem: Problem, paged: bool = False) -> Run:
    """PyTorch's fused attention with a dense mask.

    Args:
        paged: keys are gathered from a paged cache first, in every layer; else they lie together.
    """
    mask_WL = problem.mask_WL()
    query, *gathered = (x.transpose(1, 2) for x in _batched(problem))
    page = problem.pages_RP.flatten().long()

    def gather(pages: Tensor) -> Tensor:
        found = pages[page].view(len(problem.pages_RP), -1, *pages.shape[2:])
        return found[:, : problem.length].transpose(1, 2)

    def run() -> Tensor:
        key, value = map(gather, problem.paged) if paged else gathered
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask_WL, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return run


sdpa_paged = partial(sdpa, paged=True)


def flex(problem: Problem) -> Run:
    """FlexAttention, compiled, with a block mask; keys already gathered side by side."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    context, size = problem.case.context, problem.case.block_size
    query, key, value = (x.transpose(1, 2).contiguous() for x in _batched(problem))
    device = query.device

    def rule(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < context) | ((k - context) // size <= q // size)

    try:
        mask = create_block_mask(
            rule, None, None, problem.case.window, problem.length, device=device
        )
        compiled = _compiled(flex_attention)
        compiled(query, key, value, block_mask=mask, enable_gqa=True)
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error

    def run() -> Tensor:
        out = compiled(query, key, value, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return run


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _batched(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    query_RWHD = problem.query_THD.view(
        problem.case.requests, problem.case.window, *problem.query_THD.shape[1:]
    )
    return query_RWHD, problem.key_RLKD, problem.value_RLKD


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


def _metadata(problem: Problem) -> dict[str, Any]:
    """The arguments that both kernels take alike."""
    if problem.query_THD.device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    device = problem.query_THD.device
    sequences = problem.sequences()
    key_cache, value_cache = problem.paged
    return dict(
        q=problem.query_THD,
        k=key_cache,
        v=value_cache,
        out=torch.empty_like(problem.query_THD),
        cu_seqlens_q=torch.from_numpy(sequences.query_start_S1).to(device),
        max_seqlen_q=problem.case.block_size,
        seqused_k=torch.from_numpy(sequences.kv_len_S).to(device),
        max_seqlen_k=problem.length,
        softmax_scale=problem.layer.head_dim**-0.5,
        causal=False,
        block_table=problem.pages_RP[torch.from_numpy(sequences.request_S).to(device)],
        softcap=0.0,
    )


def vllm_flash_attn(problem: Problem) -> Run:
    """FLASH_ATTN: FlashAttention as vLLM builds it."""
    arguments = _metadata(problem)
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable(f"vllm.vllm_flash_attn: {error}") from error

    def run() -> Tensor:
        flash_attn_varlen_func(**arguments)
        return arguments["out"]

    return run


def vllm_triton(problem: Problem) -> Run:
    """TRITON_ATTN: vLLM's unified kernel, without splits over keys."""
    arguments = _metadata(problem)
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError as error:
        raise Unavailable(f"vLLM's Triton attention: {error}") from error

    def run() -> Tensor:
        unified_attention(
            **arguments, window_size=(-1, -1), q_descale=None, k_descale=None, v_descale=None
        )
        return arguments["out"]

    return run


VARIANTS: dict[str, Callable[[Problem], Run]] = {
    "virtual": virtual,
    "sdpa": sdpa,
    "sdpa_paged": sdpa_paged,
    "flex": flex,
    "flashinfer_fa2": flashinfer_fa2,
    "flashinfer_fa3": flashinfer_fa3,
    "flashinfer_cascade": flashinfer_cascade,
    "flashinfer_mask": flashinfer_mask,
    "flashinfer_jit": flashinfer_jit,
    "vllm_flash_attn": vllm_flash_attn,
    "vllm_triton": vllm_triton,
}
"""The one interface of all variants: set up for a problem, get what a layer runs.

Only one that is at least 5 % faster than `virtual` in cases that matter, 1 to 16 requests with
blocks of 32, moves into the engine."""
