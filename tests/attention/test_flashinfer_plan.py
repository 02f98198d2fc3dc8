# SPDX-License-Identifier: Apache-2.0
"""What the CUDA backend asks of FlashInfer is exactly block-causal attention.

FlashInfer itself needs a GPU. `Emulated` takes its place: it takes the same calls, checks them as
FlashInfer documents them, and computes paged attention in float64. Steps that a FULL graph replays
are tested in test_full_graphs.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm")

from flashinfer_emulation import HEAD, Emulated, common_metadata, dense, make_builder, put_in_place  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import KVCacheLayout  # noqa: E402

from vllm_d2f.attention import flashinfer  # noqa: E402
from vllm_d2f.attention import selection as select  # noqa: E402
from vllm_d2f.attention.page_lists import PageLists  # noqa: E402
from vllm_d2f.blocks import block_sequences  # noqa: E402


@pytest.fixture
def emulated(monkeypatch):
    put_in_place(monkeypatch)


def random_batch(rng, num_reqs):
    """Requests in every phase: prompt, window, recomputed, tail behind cached pages."""
    prompt, block = rng.integers(1, 50, num_reqs), rng.integers(1, 20, num_reqs)
    start, stop = np.zeros((2, num_reqs), dtype=np.int64)
    for r in range(num_reqs):
        committed = prompt[r] + block[r] * rng.integers(0, 4)
        phase = rng.integers(4)
        if phase == 0:
            stop[r] = prompt[r]
        elif phase == 1:
            start[r], stop[r] = committed, committed + rng.integers(1, 60)
        else:
            stop[r] = committed
            start[r] = rng.integers(0, committed) if phase == 3 else 0
    return start, stop, prompt, block


@pytest.mark.parametrize("layout", [KVCacheLayout.LBNHC, KVCacheLayout.LBHNC])
@pytest.mark.parametrize(
    ("heads", "page_size"),
    [((28, 4), 16), ((28, 4), 1), ((32, 32), 16), ((4, 1), 48), ((4, 1), 256)],
)
def test_planned_calls_are_block_causal_attention(monkeypatch, emulated, heads, page_size, layout):
    rng = np.random.default_rng(page_size + heads[1])
    builder = make_builder(monkeypatch, heads, page_size, layout)
    impl = flashinfer.BlockCausalImpl(heads[0], HEAD, HEAD**-0.5, heads[1])
    scales = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    for _ in range(2):
        num_reqs = int(rng.integers(1, 5))
        batch = start, stop, prompt, block = random_batch(rng, num_reqs)
        per_request = -(-int(stop.max()) // page_size)
        table = torch.from_numpy(rng.permutation(num_reqs * per_request).astype(np.int32))
        table = table.view(num_reqs, per_request)
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))

        def random(*shape, generator=generator):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        # vLLM's logical shape; what no sequence may read is NaN.
        cache = torch.full(
            (table.numel(), heads[1], page_size, 2 * HEAD), torch.nan, dtype=torch.float64
        )
        contents = []
        for r in range(num_reqs):
            key, value = random(int(stop[r]), heads[1], HEAD), random(int(stop[r]), heads[1], HEAD)
            position = torch.arange(int(stop[r]))
            page = table[r].long()[position // page_size]
            cache[page, :, position % page_size] = torch.cat((key, value), -1)
            contents.append((key, value))
        # In memory as the layout wants it, seen in the logical order.
        order = list(layout.layer_view_order)
        inverse = [order.index(axis) for axis in range(4)]
        cache = cache.permute(*order).contiguous().permute(*inverse)

        sequences = block_sequences(*batch)
        tokens = int((stop - start).sum())
        query = random(tokens + 3, heads[0], HEAD)  # three rows of padding
        metadata = builder.build(0, common_metadata(sequences, table, page_size, 3))
        output = torch.full_like(query, 7.0)
        impl.forward(scales, query, None, None, cache, metadata, output)
        at = 0
        for r, (key, value) in enumerate(contents):
            rows = slice(at, at := at + int(stop[r] - start[r]))
            want = dense(query[rows], key, value, *(int(x[r]) for x in batch))
            torch.testing.assert_close(output[rows], want, rtol=0, atol=1e-12)
        assert (output[tokens:] == 7).all()
    assert Emulated.made == 1 and metadata.wrapper.plans == 2  # once a step, for all layers
    assert metadata.wrapper.types == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("auto", torch.bfloat16)],
)
def test_fp8_cache(monkeypatch, emulated, name, kind):
    """An fp8 cache arrives as bytes, is read in its type and scaled back."""
    builder = make_builder(monkeypatch, (4, 2), 16, KVCacheLayout.LBNHC, cache_dtype=name)
    impl = flashinfer.BlockCausalImpl(4, HEAD, HEAD**-0.5, 2, kv_cache_dtype=name)
    content = torch.randn(2, 2, 16, 2 * HEAD).to(kind)
    stored = content.view(torch.uint8) if name != "auto" else content
    sequences = block_sequences(*(np.array([x]) for x in (12, 28, 12, 8)))
    metadata = builder.build(0, common_metadata(sequences, torch.tensor([[1, 0]]).int(), 16))
    query, output = torch.randn(2, 16, 4, HEAD, dtype=torch.float64)
    scales = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0)
    impl.forward(scales, query, None, None, stored, metadata, output)
    assert metadata.wrapper.types == (torch.bfloat16, kind)
    side = content.double()[[1, 0]].transpose(1, 2).flatten(0, 1)[:28]
    want = dense(query, side[..., :HEAD] * 0.5, side[..., HEAD:] * 2, 12, 28, 12, 8)
    torch.testing.assert_close(output, want, rtol=0, atol=1e-12)


def test_more_sequences_than_max_num_seqs(monkeypatch, emulated):
    """Where vLLM's FlashInfer builder writes beyond its buffers: one request, many blocks."""
    builder = make_builder(monkeypatch, (4, 2), 16, KVCacheLayout.LBNHC, seqs=1, blocks=2)
    sequences = block_sequences(*(np.array([x]) for x in (0, 202, 10, 4)))
    assert len(sequences.kv_len_S) == 49
    table = torch.arange(16, dtype=torch.int32)[None]
    held = builder.pages.buffer_N.data_ptr()
    metadata = builder.build(0, common_metadata(sequences, table, 16))
    pages = metadata.wrapper.call[2]
    # More pages than an ordinary step has: memory of its own, the buffer stays what it was.
    assert len(pages) > len(builder.pages.buffer_N) and pages.data_ptr() != held
    assert builder.pages.buffer_N.data_ptr() == held


def test_page_lists_stay_at_their_address():
    """Windows of 1 to 8 blocks in 1,000 random steps, the widest batch included."""
    rng = np.random.default_rng(0)
    page_size, max_reqs, blocks, size, length = 16, 16, 8, 32, 1024
    per_request = length // page_size
    lists = PageLists(page_size, max_reqs * blocks * per_request, "cpu")
    address = lists.buffer_N.data_ptr()
    for step in range(1000):
        num_reqs = max_reqs if step == 0 else int(rng.integers(1, max_reqs + 1))
        width = size * (blocks if step == 0 else int(rng.integers(1, blocks + 1)))
        prompt = rng.integers(1, length - width + 1, num_reqs)
        prompt[:] = length - width if step == 0 else prompt
        sequences = block_sequences(prompt, prompt + width, prompt, np.full(num_reqs, size))
        table = torch.from_numpy(rng.integers(0, 1 << 20, (num_reqs, per_request), dtype=np.int32))
        table_S = table[torch.from_numpy(sequences.request_S)]
        paged = lists.build(sequences.query_start_S1, sequences.kv_len_S, table_S)
        assert paged.pages_N.data_ptr() == address
        # Each sequence's pages, one by one, for some.
        for s in rng.integers(0, len(table_S), 2):
            low, high = paged.page_start_S1[s : s + 2]
            assert torch.equal(paged.pages_N[low:high], table_S[s, : high - low])
            assert high - low == -(-sequences.kv_len_S[s] // page_size)


def test_a_table_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="block table"):
        PageLists(16, 8, "cpu").build(
            np.array([0, 4], np.int32), np.array([33], np.int32), torch.zeros(1, 2).int()
        )


def test_causal_batches_and_other_models_are_refused(monkeypatch, emulated):
    builder = make_builder(monkeypatch, (4, 2), 16, KVCacheLayout.LBNHC)
    common = common_metadata(
        block_sequences(*(np.array([x]) for x in (0, 8, 8, 4))), torch.zeros(1, 1).int(), 16
    )
    common.causal = True
    with pytest.raises(ValueError, match="attention-backend"):
        builder.build(0, common)
    with pytest.raises(NotImplementedError, match="sliding window"):
        flashinfer.BlockCausalImpl(4, HEAD, 0.1, 2, sliding_window=64)


def vllm_config(backend, mode, head_size=128):
    return SimpleNamespace(
        model_config=SimpleNamespace(get_head_size=lambda: head_size),
        attention_config=SimpleNamespace(backend=backend, use_non_causal=False),
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
    )


def test_choice_of_the_backend(monkeypatch):
    select.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is flashinfer.BlockCausalBackend
    there = {"flashinfer": object()}
    monkeypatch.setattr(select, "find_spec", there.get)
    for given in (None, AttentionBackendEnum.FLASHINFER, AttentionBackendEnum.CUSTOM):
        config = vllm_config(given, None)
        select.prepare(config)
        assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
        assert config.attention_config.use_non_causal
    for given in (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN):
        config = vllm_config(given, CUDAGraphMode.FULL_AND_PIECEWISE)
        select.prepare(config)
        assert config.attention_config.backend is given
        # Their buffers for max_num_seqs are those of FULL graphs.
        assert config.compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE
    config = vllm_config(None, CUDAGraphMode.NONE)
    select.prepare(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE

    there.clear()
    config = vllm_config(None, None)
    select.prepare(config)
    assert config.attention_config.backend is None  # vLLM chooses
    with pytest.raises(ValueError, match="pip install flashinfer-python"):
        select.prepare(vllm_config(AttentionBackendEnum.FLASHINFER, None))


def test_heads_that_flashinfer_does_not_have(monkeypatch):
    """d2f-tiny has heads of 32: with FlashInfer installed it must start all the same."""
    select.register()
    monkeypatch.setattr(select, "find_spec", {"flashinfer": object()}.get)
    assert list(select.HEAD_SIZES) == flashinfer.BlockCausalBackend.get_supported_head_sizes()
    config = vllm_config(None, None, head_size=32)
    select.prepare(config)
    assert config.attention_config.backend is None  # vLLM chooses
    assert config.attention_config.use_non_causal
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE
    with pytest.raises(ValueError, match="heads of 32.*--attention-backend TRITON_ATTN"):
        select.prepare(vllm_config(AttentionBackendEnum.FLASHINFER, None, head_size=32))
    config = vllm_config(AttentionBackendEnum.TRITON_ATTN, None, head_size=32)
    select.prepare(config)
    assert config.attention_config.backend is AttentionBackendEnum.TRITON_ATTN


def test_vllm_accepts_the_backend():
    """vLLM's own check of a configuration: 7B shapes, every page size, fp8."""
    from vllm.platforms.interface import DeviceCapability

    def reasons(**changes):
        given = dict(
            head_size=128,
            dtype=torch.bfloat16,
            kv_cache_dtype="auto",
            block_size=16,
            use_mla=False,
            has_sink=False,
            use_sparse=False,
            use_mm_prefix=False,
            use_per_head_quant_scales=False,
            device_capability=DeviceCapability(9, 0),
            attn_type="decoder",
            use_non_causal=True,
        )
        return flashinfer.BlockCausalBackend.validate_configuration(**given | changes)

    assert reasons() == []
    for size in (1, 16, 48, 128, 1024):
        assert reasons(block_size=size) == []
    assert reasons(kv_cache_dtype="fp8", dtype=torch.float16) == []
    assert reasons(dtype=torch.float32) and reasons(head_size=96)
    assert reasons(kv_cache_dtype="nvfp4") and reasons(device_capability=DeviceCapability(7, 5))
