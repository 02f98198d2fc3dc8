# SPDX-License-Identifier: Apache-2.0
"""FULL CUDA graphs: what is captured, which steps replay, and what the recorded kernels read.

A graph needs a device. Here `flashinfer_emulation` stands for the recorded kernels: its `run` reads
the buffers it was made with, like a replay. All the rest is real: vLLM's list of graphs and its
choice among them, `prepare_attn`, the builder.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm")

from flashinfer_emulation import HEAD, Emulated, dense, make_builder, put_in_place  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.kv_cache_interface import KVCacheLayout  # noqa: E402
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner  # noqa: E402
from vllm.v1.worker.utils import get_uniform_decode_token_count  # noqa: E402
from vllm_d2f.patches import p12_cuda_graphs as p12  # noqa: E402
from vllm_d2f.patches.patch import function_of, source_hash  # noqa: E402

from vllm_d2f.attention import flashinfer  # noqa: E402
from vllm_d2f.attention import selection as select  # noqa: E402
from vllm_d2f.attention.cuda_graphs import Shape, fill_up, shapes, whole_blocks  # noqa: E402
from vllm_d2f.blocks import block_sequences  # noqa: E402
from vllm_d2f.settings import settings_from_dict  # noqa: E402
from vllm_d2f.worker.model_state import D2FModelState  # noqa: E402

FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE


# What is captured


def test_shapes():
    got = shapes(block_size=32, widest=128, max_num_seqs=6, max_tokens=512)
    assert [s for s in got if s.width == 32] == [Shape(n, 32) for n in (1, 2, 4, 6)]
    assert [s for s in got if s.width == 128] == [Shape(1, 128), Shape(2, 128), Shape(4, 128)]
    assert {s.width for s in got} == {32, 64, 96, 128}
    assert shapes(32, 128, 1, 512) == [Shape(1, w) for w in (32, 64, 96, 128)]
    assert shapes(32, 128, 256, 0) == []
    assert shapes(32, 64, 256, 512)[-1] == Shape(8, 64)


def manager(architecture="DreamModel", mode="FULL_AND_PIECEWISE", canvas=128, seqs=16, most=512):
    """vLLM's manager as its constructor leaves it before the list is made; no device is asked."""
    made = object.__new__(CudaGraphManager)
    d2f = settings_from_dict({"block_size": 32, "max_blocks": 4}).as_dict()
    hf_config = SimpleNamespace(d2f=d2f, family=None, canvas_length=canvas)
    made.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(architectures=[architecture], hf_config=hf_config),
        speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
    made.compilation_config = SimpleNamespace(
        cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=most
    )
    made.cudagraph_mode = CUDAGraphMode[mode]
    made.max_num_reqs, made.decode_query_len = seqs, canvas
    made.varlen_decode, made.ubatch_runner, made.lora_capture_cases = False, None, [0]
    made._lora_dispatch_map, made._max_lora_case = {}, 0
    made._candidates, made._capture_descs = {}, {}
    made._graphs_captured = True
    return made


@pytest.fixture
def stock(monkeypatch):
    """vLLM's own functions, and afterwards what was there before."""
    for owner, name in ((CudaGraphManager, "_init_candidates"), BATCH):
        monkeypatch.setattr(owner, name, function_of(vars(owner)[name]))


BATCH = (GPUModelRunner, "gather_batch_req_state")


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_every_width_has_its_graphs(stock, mode):
    p12.p12_cuda_graphs.install()
    p12.p12_cuda_graphs.install()
    graphs = manager(mode=mode)
    graphs._init_candidates()
    captured = graphs._capture_descs[FULL]
    assert len(set(captured)) == len(captured)
    assert [d.num_tokens for d in captured] == sorted(d.num_tokens for d in captured)[::-1]
    assert {(d.num_reqs, d.uniform_token_count) for d in captured} == set(shapes(32, 128, 16, 512))
    for width in (32, 64, 96, 128):
        for num_reqs in range(1, 17):
            tokens = num_reqs * width
            got = graphs.dispatch(num_reqs, tokens, width, 0, max_query_len=width)
            rooms = [s.num_reqs for s in shapes(32, 128, 16, 512) if s.width == width]
            if fitting := [n for n in rooms if n >= num_reqs]:
                assert got.cg_mode == FULL and got.uniform_token_count == width
                assert got.num_reqs == min(fitting) and got.num_tokens == got.num_reqs * width
            else:
                assert got.cg_mode != FULL
            # The same tokens in another form.
            got = graphs.dispatch(num_reqs, tokens, None, 0, max_query_len=width)
            piecewise = mode == "FULL_AND_PIECEWISE" and tokens <= 512
            assert got.cg_mode == (PIECEWISE if piecewise else NONE)
            assert tokens > 512 or got.num_tokens >= tokens
    assert graphs.dispatch(2, 2 * 40, 40, 0, max_query_len=40).cg_mode != FULL


def test_a_canvas_wider_than_what_is_captured(stock):
    """vLLM has no FULL graph then; narrower windows do."""
    graphs = manager(canvas=1024, seqs=4)
    graphs._init_candidates()
    assert FULL not in graphs._capture_descs
    p12.p12_cuda_graphs.install()
    graphs = manager(canvas=1024, seqs=4)
    graphs._init_candidates()
    assert {d.uniform_token_count for d in graphs._capture_descs[FULL]} == set(range(32, 513, 32))
    got = graphs.dispatch(3, 3 * 64, 64, 0, max_query_len=64)
    assert got.cg_mode == FULL and got.uniform_token_count == 64
    graphs = manager(canvas=1024, seqs=4, most=16)
    graphs._init_candidates()
    assert FULL not in graphs._capture_descs


def test_other_models_and_piecewise_graphs_stay_vllms(stock):
    lists = {}
    for patched in (False, True):
        if patched:
            p12.p12_cuda_graphs.install()
        for name, given in {
            "other": dict(architecture="Qwen2ForCausalLM"),
            "piecewise": dict(mode="PIECEWISE"),
            "none": dict(mode="NONE"),
        }.items():
            graphs = manager(**given)
            graphs._init_candidates()
            lists[name, patched] = graphs._candidates, graphs._capture_descs
        mine = manager()
        mine._init_candidates()
        lists["mine", patched] = mine._capture_descs[PIECEWISE]
    for name in ("other", "piecewise", "none", "mine"):
        assert lists[name, False] == lists[name, True], name


def test_it_was_written_against_this_vllm():
    for owner, name, target in (
        (CudaGraphManager, "_init_candidates", p12.CANDIDATES),
        (*BATCH, p12.BATCH),
    ):
        assert source_hash(vars(owner)[name]) == p12.p12_cuda_graphs.written_against[target]


def test_still_needed(stock):
    """Fails when vLLM captures several widths by itself: then see what of p12 can go."""
    graphs = manager()
    graphs._init_candidates()
    assert {d.uniform_token_count for d in graphs._capture_descs[FULL]} == {128}


# Which steps replay


def test_whole_blocks_are_what_a_graph_has_recorded():
    """Against the sequences themselves, on random steps."""
    rng = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(3000):
        num_reqs = int(rng.integers(1, 5))
        prompt = rng.integers(1, 40, num_reqs)
        block = np.full(num_reqs, 8)
        start = prompt + 8 * rng.integers(0, 4, num_reqs)
        length = np.full(num_reqs, 8 * rng.integers(1, 5))
        odd = int(rng.integers(0, num_reqs))
        match rng.integers(8):
            case 0:
                start[odd] += rng.integers(1, 8)
            case 1:
                length[odd] += rng.integers(1, 9)
            case 2:
                block[odd] = rng.integers(1, 12)
            case 3:
                start[odd] = rng.integers(0, prompt[odd])
            case 4:
                length[:] = rng.integers(1, 33)
        sequences = block_sequences(start, start + length, prompt, block)
        per_request = np.bincount(sequences.request_S, minlength=num_reqs)
        recorded = (
            (np.diff(sequences.query_start_S1) == 8).all()
            and (per_request == per_request[0]).all()
            # The prompt may have the length of a block; a graph could run it, but need not.
            and (start >= prompt).all()
        )
        fits = whole_blocks(start, length, prompt, block, 8)
        assert not fits or recorded
        if recorded and (block == 8).all():
            assert fits
        seen[fits] += 1
    assert min(seen.values()) > 800


def test_a_step_of_another_form_is_not_uniform(stock):
    """p12's veto, on a batch that vLLM calls uniform: equal lengths, but another block size."""
    state = object.__new__(D2FModelState)
    state.settings = settings_from_dict({"block_size": 32, "max_blocks": 4})
    state.states = SimpleNamespace(
        origin_S=np.array([10, 20, 30]), block_size_S=np.array([32, 16, 32])
    )
    runner = SimpleNamespace(
        model_state=state,
        req_states=SimpleNamespace(num_computed_tokens_np=np.array([42, 20, 30], dtype=np.int32)),
    )

    def original(self, scheduler_output, dummy_run):
        if dummy_run:
            return None, 64
        slots = np.array(scheduler_output)
        lengths = np.full(len(slots), 64, dtype=np.int32)
        batch = SimpleNamespace(idx_mapping_np=slots, num_scheduled_tokens=lengths)
        return batch, get_uniform_decode_token_count(len(slots), 64 * len(slots), 64, True)

    patched = p12.p12_cuda_graphs.wrap(p12.BATCH, original)
    assert patched(runner, [0, 2], False)[1] == 64
    assert patched(runner, [0, 1], False)[1] is None
    assert patched(runner, [], True) == (None, 64)
    other = SimpleNamespace(model_state=object())
    assert patched(other, [0, 1], False)[1] == 64


# What the recorded kernels read


class Steps:
    """`prepare_attn` and its builder for 4 blocks of 8 and up to 8 requests."""

    block, blocks, seqs, page, length = 8, 4, 8, 16, 256

    def __init__(self, monkeypatch, heads=(4, 2), **options):
        put_in_place(monkeypatch)
        self.seqs = options.setdefault("seqs", self.seqs)
        layout = KVCacheLayout.LBNHC
        self.builder = make_builder(
            monkeypatch, heads, self.page, layout, length=self.length, **options
        )
        self.heads = heads
        self.impl = flashinfer.BlockCausalImpl(heads[0], HEAD, HEAD**-0.5, heads[1])
        self.state = state = object.__new__(D2FModelState)
        state.settings = settings_from_dict({"block_size": self.block, "max_blocks": self.blocks})
        state.model_config = SimpleNamespace(max_model_len=self.length)
        state.full_graphs, state.kv_zeroing, state.device = True, None, torch.device("cpu")
        state.states = SimpleNamespace(
            origin_S=np.full(self.seqs, 1 << 40),
            block_size_S=np.ones(self.seqs, dtype=np.int64),
            origin_zero=False,
        )
        group = SimpleNamespace(
            layer_names=["a", "b"],
            kv_cache_spec=None,
            get_metadata_builder=lambda ubatch: self.builder,
            build_metadata=lambda common, ubatch: self.builder.build(0, common),
            build_metadata_for_cudagraph_capture=(
                lambda common, ubatch: self.builder.build_for_cudagraph_capture(common)
            ),
        )
        self.groups = [[group]]
        spec = SimpleNamespace(block_size=self.page)
        self.cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])

    def plan(self, shape, slots, start, length, tables, *, mode=FULL, capture=False):
        """One step's metadata of a layer, for a batch that is padded to `shape`."""
        query_start = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        tokens = int(query_start[-1])
        batch = SimpleNamespace(
            idx_mapping_np=np.asarray(slots),
            num_computed_tokens_np=np.asarray(start, dtype=np.int32),
            query_start_loc_np=query_start,
            num_reqs=len(slots),
            num_tokens=tokens,
            num_tokens_after_padding=shape.num_reqs * shape.width if shape else tokens,
        )
        metadata = self.state.prepare_attn(
            batch,
            NONE if capture else mode,
            (tables,),
            torch.zeros(1, tokens, dtype=torch.int64),
            self.groups,
            self.cache_config,
            for_capture=capture,
        )
        assert metadata["a"] is metadata["b"]
        return metadata["a"]

    def capture(self, shape):
        """As vLLM's `prepare_inputs_to_capture`: made-up requests from position 0 on, page 0."""
        tables = torch.zeros(shape.num_reqs, self.length // self.page, dtype=torch.int32)
        slots, zeros = np.arange(shape.num_reqs), np.zeros(shape.num_reqs)
        lengths = np.full(shape.num_reqs, shape.width)
        return self.plan(shape, slots, zeros, lengths, tables, capture=True)


def test_a_run_without_requests_may_be_longer_than_the_page_tables(monkeypatch):
    """vLLM's autotuning gives its whole budget to few made-up requests."""
    steps = Steps(monkeypatch)
    tables = torch.zeros(2, steps.length // steps.page, dtype=torch.int32)
    metadata = steps.plan(None, [0, 1], [0, 0], [steps.length + 40, 16], tables, mode=NONE)
    assert metadata.wrapper.call[3].tolist() == [steps.length, 16]


def test_a_query_that_was_scheduled_ahead_fits_into_the_page_list(monkeypatch):
    """It is up to twice as wide as a window, and each of its blocks lists all pages."""
    steps = Steps(monkeypatch, seqs=1, canvas=64)
    (shape,) = (s for s in shapes(steps.block, 64, 1, 512) if s.width == 64)
    graph = steps.capture(shape)
    start = steps.length - 64
    steps.state.states.origin_S[0], steps.state.states.block_size_S[0] = start, steps.block
    tables = torch.arange(steps.length // steps.page, dtype=torch.int32)[None]
    metadata = steps.plan(shape, [0], [start], [64], tables)
    assert metadata.wrapper is graph.wrapper
    assert int(metadata.wrapper.buffers[1][-1]) > steps.blocks * len(tables[0])


def test_replays_read_what_was_planned_at_addresses_that_stay(monkeypatch):
    """1,000 random steps: each is planned into the buffers of its graph; some are computed."""
    steps = Steps(monkeypatch)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    captured = shapes(steps.block, steps.block * steps.blocks, steps.seqs, 512)
    graphs = {}
    for shape in sorted(captured, reverse=True):
        graphs[shape] = steps.capture(shape)
        # Every row of a graph is a query of a sequence of one block, and may be in any step.
        queries = graphs[shape].wrapper.buffers[0]
        assert queries.tolist() == list(range(0, shape.num_reqs * shape.width + 1, steps.block))

    def addresses():
        return {
            shape: [buffer.data_ptr() for buffer in graph.wrapper.buffers]
            + [graph.wrapper.plan_memory.data_ptr()]
            for shape, graph in graphs.items()
        }

    held, made = addresses(), Emulated.made
    # One wrapper for each number of sequences, one page list, and one memory for all plans.
    assert made == len({shape.num_reqs * shape.width for shape in captured})
    assert len({tuple(a)[2] for a in held.values()}) == len({a[4] for a in held.values()}) == 1

    pages = steps.seqs * steps.length // steps.page
    shape_of = (pages, steps.heads[1], steps.page, 2 * HEAD)
    cache = torch.randn(shape_of, generator=generator, dtype=torch.float64)
    cache = cache.transpose(1, 2).contiguous().transpose(1, 2)  # in memory: page, position, head
    for step in range(1000):
        shape = captured[rng.integers(len(captured))]
        smaller = [s.num_reqs for s in captured if s.width == shape.width]
        least = max([n for n in smaller if n < shape.num_reqs], default=0) + 1
        num_reqs = int(rng.integers(least, shape.num_reqs + 1))
        slots = rng.permutation(steps.seqs)[:num_reqs]
        committed = steps.block * rng.integers(0, 8, num_reqs)
        prompt = rng.integers(1, 200 - shape.width - committed, num_reqs)
        steps.state.states.origin_S[slots] = prompt
        steps.state.states.block_size_S[slots] = steps.block
        start = prompt + committed
        length = np.full(num_reqs, shape.width)
        assert steps.state.fits_full_graph(slots, start, length)
        # vLLM gathers the page tables of as many rows as the graph has.
        tables = torch.zeros(shape.num_reqs, steps.length // steps.page, dtype=torch.int32)
        tables[:num_reqs] = torch.from_numpy(rng.permutation(pages)).view(steps.seqs, -1)[:num_reqs]
        metadata = steps.plan(shape, slots, start, length, tables)
        assert metadata.wrapper is graphs[shape].wrapper and addresses() == held
        if step % 50:
            continue
        # A replay runs with the shapes of the capture: all rows of the graph.
        rows = shape.num_reqs * shape.width
        query = torch.randn(rows, steps.heads[0], HEAD, generator=generator, dtype=torch.float64)
        output = torch.full_like(query, 7.0)
        scales = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
        steps.impl.forward(scales, query, None, None, cache, graphs[shape], output)
        for r in range(num_reqs):
            stop = int(start[r]) + shape.width
            position = torch.arange(stop)
            content = cache[tables[r].long()[position // steps.page], :, position % steps.page]
            here = slice(r * shape.width, (r + 1) * shape.width)
            key, value = content.split(HEAD, -1)
            want = dense(query[here], key, value, int(start[r]), stop, prompt[r], steps.block)
            torch.testing.assert_close(output[here], want, rtol=0, atol=1e-12)
        assert (output[num_reqs * shape.width :] == 7).all()
    assert Emulated.made == made


def test_piecewise_steps_between_replays_have_a_plan_of_their_own(monkeypatch):
    """A prompt's step must not touch what graphs have recorded, except the shared page list."""
    steps = Steps(monkeypatch)
    graph = steps.capture(Shape(2, 16))
    steps.state.states.origin_S[:2], steps.state.states.block_size_S[:2] = [30, 12], 8
    tables = torch.arange(32, dtype=torch.int32).view(2, 16)
    before = [buffer.clone() for buffer in graph.wrapper.buffers]
    other = steps.plan(None, [0, 1], [0, 12], [30, 16], tables, mode=PIECEWISE)
    assert other.wrapper is not graph.wrapper and other.wrapper.buffers is None
    for index in (0, 1, 3):
        assert torch.equal(graph.wrapper.buffers[index], before[index])
    again = steps.plan(Shape(2, 16), [1], [12], [16], tables)
    assert again.wrapper is graph.wrapper
    assert graph.wrapper.buffers[0].tolist() == [0, 8, 16, 16, 16]
    assert graph.wrapper.buffers[1].tolist() == [0, 2, 4, 4, 4]  # 20 and 28 keys, pages of 16
    assert graph.wrapper.buffers[3].tolist() == [4, 12, 0, 0]
    assert graph.wrapper.buffers[2][:4].tolist() == [0, 1, 0, 1]  # row 0 of the tables


def test_fill_up_refuses_what_has_no_room():
    sequences = block_sequences(*(np.array([x]) for x in (8, 24, 8, 8)))
    assert fill_up(sequences, 2) is sequences
    with pytest.raises(ValueError, match="2 sequences in a graph of 1"):
        fill_up(sequences, 1)


# The choice


def test_full_graphs_are_the_default_and_only_with_our_backend(monkeypatch):
    select.register()
    monkeypatch.setattr(select, "find_spec", {"flashinfer": object()}.get)

    def resolved(backend, mode, head_size=128):
        config = SimpleNamespace(
            model_config=SimpleNamespace(get_head_size=lambda: head_size),
            attention_config=SimpleNamespace(backend=backend, use_non_causal=False),
            compilation_config=SimpleNamespace(cudagraph_mode=mode),
        )
        select.prepare(config)
        mode = config.compilation_config.cudagraph_mode
        support = flashinfer.BlockCausalBuilder.get_cudagraph_support(config, None)
        return mode, support

    never, uniform = AttentionCGSupport.NEVER, AttentionCGSupport.UNIFORM_BATCH
    both = CUDAGraphMode.FULL_AND_PIECEWISE
    assert resolved(None, None) == (both, uniform)
    assert resolved(None, PIECEWISE) == (PIECEWISE, never)
    assert resolved(None, both) == (both, uniform)
    assert resolved(None, CUDAGraphMode.FULL_DECODE_ONLY)[1] == uniform
    assert resolved(None, NONE) == (NONE, never)
    enum = type(select.AttentionBackendEnum.FLASH_ATTN)
    assert resolved(enum.FLASH_ATTN, None) == (PIECEWISE, never)
    assert resolved(enum.FLASH_ATTN, both) == (PIECEWISE, never)
    assert resolved(None, both, head_size=32) == (PIECEWISE, never)
