# SPDX-License-Identifier: Apache-2.0
"""Virtual sequences on vLLM's own CUDA kernels, for `benchmarks.attention`."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_problem import Problem, Run, Unavailable


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
