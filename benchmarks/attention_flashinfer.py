# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's ways to compute block-causal attention, for `benchmarks.attention` on CUDA."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention_problem import PAGE, Problem, Run, Unavailable

WORKSPACE_BYTES = 256 << 20


def _flashinfer(problem: Problem) -> tuple[Any, tuple[Tensor, Tensor], Tensor]:
    if problem.query_THD.device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    if find_spec("flashinfer") is None:
        raise Unavailable("flashinfer is not installed: pip install flashinfer-python")
    import flashinfer

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=problem.query_THD.device)
    return flashinfer, problem.paged, workspace


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


def flashinfer_virtual(problem: Problem) -> Run:
    """One non-causal sequence per block."""
    flashinfer, cache, workspace = _flashinfer(problem)
    sequences = problem.sequences()
    table_SP = problem.pages_RP[torch.from_numpy(sequences.request_S).to(problem.pages_RP.device)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *_indices(table_SP, sequences.kv_len_S, sequences.query_start_S1),
        head_dim_qk=problem.layer.head_dim,
        causal=False,
        q_data_type=problem.query_THD.dtype,
        **_heads(problem),
    )
    return lambda: wrapper.run(problem.query_THD, cache)


def flashinfer_mask(problem: Problem) -> Run:
    """One sequence per request and a custom mask."""
    flashinfer, cache, workspace = _flashinfer(problem)
    case = problem.case
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *_indices(
            problem.pages_RP,
            np.full(case.requests, problem.length),
            np.arange(case.requests + 1) * case.window,
        ),
        head_dim_qk=problem.layer.head_dim,
        custom_mask=problem.mask_WL().flatten().repeat(case.requests),
        q_data_type=problem.query_THD.dtype,
        **_heads(problem),
    )
    return lambda: wrapper.run(problem.query_THD, cache)


def flashinfer_cascade(problem: Problem) -> Run:
    """The context once per request, then the window per block, merged by their softmax sums."""
    flashinfer, cache, workspace = _flashinfer(problem)
    case = problem.case
    if case.context % PAGE:
        raise Unavailable(f"contexts must be multiples of {PAGE}")
    sequences = problem.sequences()
    request_S = torch.from_numpy(sequences.request_S).to(problem.pages_RP.device)
    window_SP = problem.pages_RP[request_S, case.context // PAGE :]
    context = _indices(
        problem.pages_RP,
        np.full(case.requests, case.context),
        np.arange(case.requests + 1) * case.window,
    )
    window = _indices(window_SP, sequences.kv_len_S - case.context, sequences.query_start_S1)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        *(list(pair) for pair in zip(context, window, strict=True)),
        head_dim=problem.layer.head_dim,
        causal=False,
        q_data_type=problem.query_THD.dtype,
        **_heads(problem),
    )
    return lambda: wrapper.run(problem.query_THD, cache)
