# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer backend as vLLM calls it, random batches in every phase, against float64.

Shape suffixes: T tokens, H query heads, K key heads, D head size, P pages.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

HEAD = 128
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "fp8": 2e-2, "fp8_e5m2": 2e-2}
"""Of attention's result, against float64 on the same rounded keys and values."""


def random_batch(rng: np.random.Generator, num_reqs: int) -> tuple[np.ndarray, ...]:
    """start, stop, prompt length, block size of requests in every phase of their life."""
    prompt, block = rng.integers(1, 400, num_reqs), rng.integers(1, 65, num_reqs)
    start, stop = np.zeros((2, num_reqs), dtype=np.int64)
    for r in range(num_reqs):
        committed = prompt[r] + block[r] * rng.integers(0, 6)
        phase = rng.integers(4)
        if phase == 0:  # a prompt
            stop[r] = prompt[r]
        elif phase == 1:  # a window
            start[r], stop[r] = committed, committed + rng.integers(1, 257)
        else:  # computed again after a preemption, or the tail behind cached pages
            stop[r] = committed
            start[r] = rng.integers(0, committed) if phase == 3 else 0
    return start, stop, prompt, block


def backend_error(
    heads: tuple[int, int], kind: str, page_size: int, seed: int, where: str = "cuda"
) -> float:
    """Largest difference between the backend on a random batch and dense float64."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheLayout

    from vllm_d2f.attention import flashinfer
    from vllm_d2f.blocks import block_sequences
    from vllm_d2f.d2f import may_attend

    device, rng = torch.device(where), np.random.default_rng(seed)
    fp8 = flashinfer.CACHE_TYPES.get(kind)
    dtype = torch.bfloat16 if fp8 else getattr(torch, kind)
    num_reqs = int(rng.integers(1, 9))
    batch = start, stop, prompt, block = random_batch(rng, num_reqs)
    per_request = -(-int(stop.max()) // page_size)
    table_RP = torch.from_numpy(rng.permutation(num_reqs * per_request).astype(np.int32))
    table_RP = table_RP.view(num_reqs, per_request).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    cache = torch.randn(
        num_reqs * per_request, page_size, heads[1], 2 * HEAD, generator=generator, device=device
    ).to(fp8 or dtype)
    # In memory tokens before heads (LBNHC), seen in vLLM's logical order.
    cache = cache.transpose(1, 2)
    sequences = block_sequences(*batch)
    query_start = torch.from_numpy(sequences.query_start_S1)
    kv_len = torch.from_numpy(sequences.kv_len_S)
    common = CommonAttentionMetadata(
        query_start_loc=query_start.to(device),
        query_start_loc_cpu=query_start,
        seq_lens=kv_len.to(device),
        seq_lens_cpu_upper_bound=kv_len,
        num_reqs=len(kv_len),
        num_actual_tokens=int(query_start[-1]),
        max_query_len=int(query_start.diff().max()),
        max_seq_len=int(kv_len.max()),
        block_table_tensor=table_RP[torch.from_numpy(sequences.request_S).to(device)],
        slot_mapping=torch.zeros(0, device=device),
        causal=False,
    )
    builder = _builder(flashinfer, heads, kind if fp8 else "auto", dtype, page_size, device)
    impl = flashinfer.BlockCausalImpl(
        heads[0], HEAD, HEAD**-0.5, heads[1], kv_cache_dtype=kind if fp8 else "auto"
    )
    query_THD = torch.randn(
        int(query_start[-1]), heads[0], HEAD, generator=generator, device=device
    ).to(dtype)
    output = torch.full_like(query_THD, torch.nan)
    scales = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    stored = cache.view(torch.uint8) if fp8 else cache
    unused = torch.empty(0)  # keys and values are in the cache already
    impl.forward(scales, query_THD, unused, unused, stored, builder.build(0, common), output)
    assert builder.vllm_config.cache_config.get_resolved_kv_cache_layout() is KVCacheLayout.LBNHC

    worst, at = 0.0, 0
    for r in range(num_reqs):
        length = int(stop[r])
        position = torch.arange(length, device=device)
        page = table_RP[r].long()[position // page_size]
        key, value = (
            x.repeat_interleave(heads[0] // heads[1], 1)
            for x in cache.double()[page, :, position % page_size].split(HEAD, dim=-1)
        )
        rows = slice(at, at := at + length - int(start[r]))
        scores = torch.einsum("qhd,khd->hqk", query_THD[rows].double(), key) / HEAD**0.5
        allowed = may_attend(
            position[int(start[r]) :, None], position[None], int(prompt[r]), int(block[r])
        )
        weight = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        want = torch.einsum("hqk,khd->qhd", weight, value)
        worst = max(worst, float((output[rows].double() - want).abs().max().nan_to_num(torch.inf)))
    return worst


def _builder(module, heads: tuple[int, int], kind: str, dtype: torch.dtype, page: int, device):
    """Return the backend's builder for one layer, without an engine around it."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    layer = SimpleNamespace(num_heads=heads[0], impl=SimpleNamespace(scale=HEAD**-0.5))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            cache_dtype=kind, get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC
        ),
        model_config=SimpleNamespace(
            dtype=dtype,
            max_model_len=2048,
            hf_config=SimpleNamespace(d2f={"max_blocks": 8}, family=None),
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=16),
    )
    spec = SimpleNamespace(num_kv_heads=heads[1], head_size=HEAD, block_size=page)
    layers_of = module.get_layers_from_vllm_config
    module.get_layers_from_vllm_config = lambda *_: {"layer": layer}
    try:
        return module.BlockCausalBuilder(spec, ["layer"], config, device)
    finally:
        module.get_layers_from_vllm_config = layers_of


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(
    "heads", [(28, 4), (32, 32), (4, 1)], ids=["dream", "llada", "multi-query"]
)
def test_the_backend_agrees_with_float64(heads, kind, page):
    assert max(backend_error(heads, kind, page, seed) for seed in range(4)) <= TOLERANCE[kind]


@pytest.mark.parametrize(("heads", "page_size"), [((8, 2), 16), ((4, 4), 48)])
def test_the_backend_check_is_exact(monkeypatch, heads, page_size):
    """With a float64 stand-in for FlashInfer nothing but rounding is left, and faults are seen."""
    pytest.importorskip("vllm")

    from test_flashinfer_plan import Emulated

    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Emulated
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "1024")
    assert backend_error(heads, "float64", page_size, 0, "cpu") < 1e-12
    monkeypatch.setattr(Emulated, "read", lambda self, pages: _read(self, pages).flip(0))
    assert backend_error(heads, "float64", page_size, 0, "cpu") > 1e-2


def _read(wrapper, pages):
    return pages.flatten(0, 1).double().repeat_interleave(wrapper.group, 1)
