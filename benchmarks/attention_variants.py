# SPDX-License-Identifier: Apache-2.0
"""The same block-causal attention, computed in several ways, for `benchmarks.attention`.

A variant is set up once per step (index arithmetic, masks, plans) and returns what one layer runs.

Shape suffixes: R requests, T = R * W query tokens, W window positions, L context + window, H query
heads, K key heads, D head size, S virtual sequences, P pages of B positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_flashinfer import (
    flashinfer_cascade,
    flashinfer_fa2,
    flashinfer_fa3,
    flashinfer_jit,
    flashinfer_mask,
    flashinfer_virtual,
)
from benchmarks.attention_problem import Problem, Run, Unavailable, cpu_isa
from benchmarks.attention_vllm import vllm_flash_attn, vllm_triton


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


def sdpa(problem: Problem) -> Run:
    """PyTorch's fused attention with a dense mask; keys already gathered side by side."""
    mask_WL = problem.mask_WL()
    query, key, value = (x.transpose(1, 2) for x in _batched(problem))

    def run() -> Tensor:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask_WL, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return run


def sdpa_paged(problem: Problem) -> Run:
    """The same from a paged cache: keys are gathered first, in every layer."""
    mask_WL = problem.mask_WL()
    query = _batched(problem)[0].transpose(1, 2)
    page = problem.pages_RP.flatten().long()

    def run() -> Tensor:
        key, value = (
            x[page]
            .view(len(problem.pages_RP), -1, *x.shape[2:])[:, : problem.length]
            .transpose(1, 2)
            for x in problem.paged
        )
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask_WL, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return run


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


_COMPILED: dict[Callable, Callable] = {}


def _compiled(function: Callable) -> Callable:
    return _COMPILED.setdefault(function, torch.compile(function, dynamic=True))


def _batched(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    query_RWHD = problem.query_THD.view(
        problem.case.requests, problem.case.window, *problem.query_THD.shape[1:]
    )
    return query_RWHD, problem.key_RLKD, problem.value_RLKD


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

Only what `benchmarks.gpu.report` finds fastest somewhere that matters moves into the engine."""
