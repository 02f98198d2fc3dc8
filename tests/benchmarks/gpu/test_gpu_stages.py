# SPDX-License-Identifier: Apache-2.0
"""What the stages compute around the device: references, shapes, summaries, timing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.attention_variants import VARIANTS
from benchmarks.gpu import attention, kernels, profiling, retrain, shapes, timing
from benchmarks.gpu.engine import BLOCK, LASTING_WINDOWS
from benchmarks.gpu.profiling import Span
from benchmarks.gpu.stage import DONE, Options, Skip, drive
from benchmarks.gpu.steps import LASTING, _warm_up
from benchmarks.gpu.store import Store, read
from benchmarks.gpu.widen import widen
from vllm_d2f.d2f import D2FParams, Window, advance, grow
from vllm_d2f.sampling.sample import simulated_confidence

CPU = torch.device("cpu")


@pytest.fixture
def options(tmp_path):
    return Options(tmp_path / "out", tmp_path / "work", rehearse=True)


# Steps.


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_windows_of_measured_steps_fill_and_last(blocks):
    """One position per forward: full after as many forwards as blocks, for `LASTING` and more."""
    extra = {name.removeprefix("d2f_"): value for name, value in LASTING_WINDOWS.items()}
    params = D2FParams(block_size=BLOCK, max_blocks=blocks, tau_conf=0.9, **extra)
    window = Window.empty(1, params.window, 1, 0, CPU)
    answer = params.window + LASTING
    window.start(0, params, max_tokens=answer, limit=4000, ends=(), mask_id=0)
    grow(window)
    open_, decided = [], []
    while int(window.open_R) and len(open_) <= 2 * answer:
        open_.append(int(window.open_R))
        masked = (window.column_W < window.open_R[:, None]) & ~window.decided_RW
        request_N, column_N = masked.nonzero(as_tuple=True)
        confidence = torch.zeros(1, params.window)
        confidence[request_N, column_N] = simulated_confidence(
            request_N, window.forward_R[request_N], 1.0
        )
        token = torch.ones(1, params.window, dtype=torch.int64)
        step = advance(window, token, confidence, 0)
        decided.append(int(step.accepted_RW.sum()))
        if bool(step.done_R):
            break
        grow(window)
    assert max(decided) == 1 and sum(decided) == answer
    full = [forward for forward, width in enumerate(open_) if width == params.window]
    assert full[0] < blocks and len(full) >= LASTING
    assert full == list(range(full[0], full[-1] + 1))


def test_a_point_whose_requests_have_ended_stops():
    """An engine without requests makes steps of nothing for ever."""
    ran = []
    engine = SimpleNamespace(
        clock=SimpleNamespace(steps=[]),
        llm=SimpleNamespace(llm_engine=SimpleNamespace(has_unfinished_requests=lambda: not ran)),
    )
    with pytest.raises(RuntimeError, match="ended before a step of 256 tokens"):
        _warm_up(engine, lambda: ran.append(1), 2, 128)
    assert ran == [1]


# Attention.


def test_attention_points(options):
    store = Store(options.out / "attention.json", "attention", {})
    assert drive(store, "dream", attention.points("dream", options), float("inf")) == DONE
    points = dict(read(store.path)["points"])
    machine = points.pop("dream/machine")
    assert machine.keys() == {"copy_gb_per_s", "matmul_gflop_per_s"}
    assert points.keys() == {"dream/64/2/1x16", "dream/64/2/2x16"}
    for point in points.values():
        assert point["floor_ms"] > 0 and point["bound"] in ("bytes", "flops")
        for name in ("virtual", "sdpa", "sdpa_paged"):
            found = point["variants"][name]
            assert found["max_error"] < 2e-5 and 0 < found["ms_min"] <= found["ms"]
            assert found["times_floor"] == pytest.approx(found["ms"] / point["floor_ms"], rel=0.05)
        for name in VARIANTS:
            if name.startswith(("flashinfer", "vllm")):
                assert "CUDA" in point["variants"][name]["unavailable"]


def test_the_whole_grid_of_the_issue_is_measured(options):
    whole = attention.cases(Options(options.out, options.work))
    assert len(whole) == len(set(whole)) == 6 * 4 * 4 * 3
    assert {c.context for c in whole} >= {256, 8192} and {c.requests for c in whole} >= {1, 64}
    assert {c.blocks for c in whole} >= {1, 8} and {c.block_size for c in whole} == {16, 32, 64}
    assert {c.requests for c in whole[:20]} <= {1, 16} and whole[0].block_size == 32


def test_a_wrong_variant_and_a_failing_one_say_so(monkeypatch):
    from benchmarks.attention_problem import Case, Layer, Problem

    one = Problem.make(Case(32, 1, 1, 8), Layer(2, 1, 16), CPU, torch.float32, 0)

    def run(set_up):
        return attention.variant(set_up, [one], 2e-5, 1.0)

    assert run(lambda p: lambda: torch.zeros_like(p.query_THD))["wrong_by"] > 1e-3
    assert "nan" in str(run(lambda p: lambda: p.query_THD * float("nan")))

    def broken(problem):
        raise RuntimeError("made up")

    assert "made up" in run(broken)["failed"]

    def lost(problem):
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="CUDA error"):
        run(lost)  # the process is of no use any more


# Timing.


def test_inputs_rotate():
    turns = []
    runs = [lambda i=i: turns.append(i) for i in range(3)]
    found = timing.measure(runs, CPU, repeats=4, warm_up=3)
    assert turns == [0, 1, 2, 0, 1, 2, 0]
    assert 0 < found.ms_min <= found.ms < 1000
    assert timing.copies(1 << 40) == 1 and timing.copies(1) == 8
    assert timing.copies(timing.L2_BYTES) == 4


# Kernels.


@pytest.mark.parametrize("rule", list(kernels.RULES))
def test_confidences_are_compared_with_float64(rule):
    """What `proposal` gives passes, a confidence or token that is off does not."""
    from vllm_d2f.sampling.sample import sample_drawn, sample_greedy

    rows, size, mask_id = 16, 1000, 7
    logits = (3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(1))).bfloat16()
    how = kernels.sampling(rule, rows, "cpu")
    counters = torch.arange(rows)
    if how is None:
        token, value = sample_greedy(logits.float(), mask_id)
    else:
        token, value = sample_drawn(logits.float(), mask_id, how, counters, counters % 7)
    same, error = kernels.confidence_error(logits, mask_id, token, value, how, counters)
    assert same and error <= kernels.RULES[rule]
    same, error = kernels.confidence_error(logits, mask_id, token, value * 1.01, how, counters)
    assert same and error > 5e-3
    other = torch.where(token == 0, 1, 0)
    assert not kernels.confidence_error(logits, mask_id, other, value, how, counters)[0]


@pytest.mark.parametrize(("heads", "page_size"), [((8, 2), 16), ((4, 4), 48)])
def test_the_backend_check_is_exact(monkeypatch, heads, page_size):
    """With a float64 stand-in for FlashInfer nothing but rounding is left, and faults are seen."""
    pytest.importorskip("vllm")
    from types import ModuleType

    from test_flashinfer_plan import Emulated

    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Emulated
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "1024")
    assert kernels.backend_error(heads, "float64", page_size, 0, "cpu") < 1e-12
    monkeypatch.setattr(Emulated, "read", lambda self, pages: _read(self, pages).flip(0))
    assert kernels.backend_error(heads, "float64", page_size, 0, "cpu") > 1e-2


def _read(wrapper, pages):
    return pages.flatten(0, 1).double().repeat_interleave(wrapper.group, 1)


def test_counts_of_pytest():
    output = "x\n=== 3 passed, 2 skipped, 40 deselected in 1.00s ==="
    assert kernels.test_counts(output, 0) == {
        "exit_code": 0,
        "passed": 3,
        "skipped": 2,
        "deselected": 40,
    }
    with pytest.raises(AssertionError, match="tests/a.py::test_b"):
        kernels.test_counts("FAILED tests/a.py::test_b - assert\n1 failed, 3 passed in 2s", 1)
    with pytest.raises(Skip, match="pytest"):
        kernels.test_counts("", 1)


# Models.


def test_shapes_are_those_of_the_models(tmp_path):
    """Read as the official configs are; the bytes of a step are those of the real matrices."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllm_d2f import register

    register()
    for name in ("qwen", "llama"):
        config = AutoConfig.from_pretrained(shapes.write(tmp_path, name))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        matrices = {k: p.numel() for k, p in model.named_parameters() if p.dim() == 2}
        del matrices["model.embed_tokens.weight"]
        assert shapes.weight_bytes(name)["step"] == 2 * sum(matrices.values())
        assert shapes.weight_bytes(name)["head"] == 2 * matrices["lm_head.weight"]
    dream = AutoConfig.from_pretrained(shapes.write(tmp_path, "dream"))
    assert (dream.num_attention_heads, dream.num_key_value_heads) == (28, 4)
    assert shapes.weight_bytes("dream") == shapes.weight_bytes("qwen")
    llada = AutoConfig.from_pretrained(shapes.write(tmp_path, "llada"))
    assert (llada.hidden_size, llada.num_hidden_layers, llada.num_key_value_heads) == (4096, 32, 32)
    assert shapes.kv_bytes_per_token("llada") == 2 * 32 * 4096 * 2
    assert shapes.kv_bytes_per_token("dream") == 28 * 2 * 4 * 128 * 2
    for name in shapes.SHAPES:
        small = AutoConfig.from_pretrained(shapes.write(tmp_path, name, small=True))
        assert small.hidden_size == 64 and small.vocab_size == 512


@pytest.mark.parametrize("factor", [2, 4])
def test_a_widened_model_is_the_same_function(tmp_path, factor):
    from vllm_d2f.hub.names import resolve
    from vllm_d2f.models.hf import load_hf

    source = Path(resolve("d2f-tiny"))
    target = widen(source, tmp_path / "wide", factor)
    config = json.loads((target / "config.json").read_text())
    assert config["hidden_size"] // config["num_attention_heads"] == 32 * factor
    ids = torch.randint(2, 400, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (source, target):
        model, _ = load_hf(str(folder))
        with torch.no_grad():
            logits.append(model(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-3)
    assert torch.equal(logits[1].argmax(-1), logits[0].argmax(-1))
    assert logits[0].std() > 0.5


# The profile's summary.


def test_busy_idle_gaps_and_waits():
    spans = [
        Span("gemm", 100, 150, True),
        Span("attention", 160, 180, True),
        Span("copy", 170, 175, True),  # another stream, inside
        Span("gemm", 200, 250, True),
        Span("cudaEventSynchronize", 90, 240, False),
        Span("cudaLaunchKernel", 95, 96, False),
        Span("cudaMemcpyAsync", 96, 97, False),
        Span("aten::mm", 90, 300, False),
    ]
    found = profiling.summary(spans[::-1], steps=2)
    assert found["device_busy_ms"] == 0.06 and found["device_idle_ms"] == 0.015
    assert found["kernels_per_step"] == 2
    first = found["top_kernels"][0]
    assert first["name"] == "gemm" and first["ms_per_step"] == 0.05 and first["per_step"] == 1
    assert first["share"] == pytest.approx(0.8)
    assert found["top_gaps"][0] == {"after": "attention", "before": "gemm", "ms_per_step": 0.01}
    assert found["waits"] == {
        "cudaEventSynchronize": {"per_step": 0.5, "ms_per_step": 0.075},
        "cudaMemcpyAsync": {"per_step": 0.5, "ms_per_step": 0.0005},
    }
    assert profiling.summary([], 1)["device_busy_ms"] == 0


def test_named_ranges_of_a_trace_are_no_work():
    on_cpu = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=on_cpu) as traced,
        torch.profiler.record_function("a named range"),
    ):
        torch.ones(3) @ torch.ones(3)
    assert "a named range" in {event.name for event in traced.events()}
    spans = profiling.spans_of(traced.events())
    assert "aten::dot" in {span.name for span in spans}
    assert "a named range" not in {span.name for span in spans}
    assert not any(span.on_device for span in spans)


# Training.


def test_models_travel_or_are_refused(tmp_path):
    import tarfile

    models = tmp_path / "models"
    for name in ("a", "b"):
        (models / name).mkdir(parents=True)
        (models / name / "model.safetensors").write_bytes(b"x" * 1000)
    found = retrain.pack(models, tmp_path / "m.tar.gz")
    assert found["models"] == ["a", "b"]
    first = (tmp_path / "m.tar.gz").read_bytes()
    retrain.pack(models, tmp_path / "m.tar.gz")
    assert (tmp_path / "m.tar.gz").read_bytes() == first
    with tarfile.open(tmp_path / "m.tar.gz") as archive:
        assert archive.getnames() == ["a/model.safetensors", "b/model.safetensors"]
    with pytest.raises(RuntimeError, match="can travel"):
        retrain.pack(models, tmp_path / "n.tar.gz", limit=10)
    assert not (tmp_path / "n.tar.gz").exists()


def test_training_that_runs_out_of_time_goes_on_later(tmp_path):
    from benchmarks.gpu.stage import Unfinished

    with pytest.raises(Unfinished):
        retrain._run(["sleep", "3600"], 0.2)
    with pytest.raises(RuntimeError, match="exit code"):
        retrain._run(["false"], 60)
