# SPDX-License-Identifier: Apache-2.0
"""What the experiments for a GPU compute around the device: windows, shapes, summaries, timing."""

import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels, steps
from benchmarks.harness import shapes, timing
from benchmarks.harness.engine import BLOCK, LASTING_WINDOWS, Clock
from benchmarks.harness.record import Skip
from benchmarks.steps import LASTING, Span, warm_up
from vllm_d2f.d2f import Beginning, D2FParams, Window, add, step
from vllm_d2f.sampling.sample import simulated_confidence

CPU = torch.device("cpu")


# Steps.


def test_a_step_is_booked_when_it_is_done_and_not_when_the_next_is_scheduled():
    """As vLLM's core calls it with asynchronous scheduling: a step ahead, and a return without."""
    ahead, done = deque(), []

    def scheduled(new, tokens):
        cached = SimpleNamespace(num_computed_tokens=[])
        total = {"total_num_scheduled_tokens": tokens * new, "scheduled_cached_reqs": cached}
        requests = dict.fromkeys(range(new), tokens)
        return SimpleNamespace(scheduled_new_reqs=[0] * new, num_scheduled_tokens=requests, **total)

    def get_output():
        ahead.append(coming.pop(0))
        if len(ahead) == 2:
            time.sleep(0.02)
            scheduler.update_from_output(ahead.popleft(), None)
        return SimpleNamespace(outputs=[])

    coming = [scheduled(*one) for one in ((22, 512), (20, 512), (1, 64))]
    scheduler = SimpleNamespace(update_from_output=lambda output, result: done.append(output))
    client = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    client.get_output = get_output
    clock = Clock().attach(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=client)))
    clock.start()
    for _ in range(3):
        client.get_output()
    assert [(step.new, step.tokens) for step in clock.steps] == [(22, 22 * 512), (20, 20 * 512)]
    assert len(done) == 2 and all(step.ms >= 20 for step in clock.steps)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_windows_of_measured_steps_fill_and_last(blocks):
    """One position per forward: full after as many forwards as blocks, for `LASTING` and more."""
    extra = LASTING_WINDOWS
    params = D2FParams(block_size=BLOCK, max_blocks=blocks, tau_conf=0.9, **extra)
    window = Window.empty(1, params.window, 1, 0, CPU)
    answer = params.window + LASTING
    window.start([0], [Beginning(params, answer, 4000, ())], 0)
    add(window)
    open_, decided = [], []
    while int(window.open_R) and len(open_) <= 2 * answer:
        open_.append(int(window.open_R))
        masked = (window.column_W < window.open_R[:, None]) & ~window.decoded_RW
        request_N, column_N = masked.nonzero(as_tuple=True)
        confidence = torch.zeros(1, params.window)
        confidence[request_N, column_N] = simulated_confidence(
            request_N, window.forward_R[request_N], 1.0
        )
        token = torch.ones(1, params.window, dtype=torch.int64)
        result = step(window, token, confidence, 0)
        decided.append(int(result.accepted_RW.sum()))
        if bool(result.done_R):
            break
        add(window)
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
        warm_up(engine, lambda: ran.append(1), 2, 128)
    assert ran == [1]


# Timing.


def test_inputs_rotate():
    turns = []
    runs = [lambda i=i: turns.append(i) for i in range(3)]
    found = timing.measure({"one": runs}, CPU, repeats=4, warm_up=3)["one"]
    assert turns == [0, 1, 2, 0, 1, 2, 0]
    assert 0 < found["ms_min"] <= found["ms"] < 1000
    gpu = torch.device("cuda")
    assert timing.copies(1 << 40, gpu) == 1 and timing.copies(1, gpu) == 8
    assert timing.copies(timing.L2_BYTES, gpu) == 4 and timing.copies(1, CPU) == 1


# Kernels.


def test_counts_of_pytest():
    output = "x\n=== 3 passed, 2 skipped, 40 deselected in 1.00s ==="
    assert kernels.counts_of(output, 0) == {
        "exit_code": 0,
        "passed": 3,
        "skipped": 2,
        "deselected": 40,
    }
    with pytest.raises(AssertionError, match="tests/a.py::test_b"):
        kernels.counts_of("FAILED tests/a.py::test_b - assert\n1 failed, 3 passed in 2s", 1)
    with pytest.raises(Skip, match="pytest"):
        kernels.counts_of("", 1)


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
    found = steps.profile_summary(spans[::-1], steps=2)
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
    assert steps.profile_summary([], 1)["device_busy_ms"] == 0


def test_the_tables_have_floors_ratios_and_bars():
    machine = {"copy_gb_per_s": 4300.0, "matmul_gflop_per_s": 790000.0}
    point = {"tokens": 128, "context_tokens": 512}
    start = {"attention": "BlockCausalImpl"}
    fast = {"steps": 44, "first_token_ms": 10.0, "peak_mib": 20000.0}
    report = {
        **{"command": "c", "hardware": {"cpu": "x", "threads": 1}, "variant": "plain"},
        "floor": machine,
        "points": {
            "dream/start": start,
            "dream/steps/512/4/1": point | {"ms": 4.8},
            "qwen/steps/512/1/1": point | {"ms": 4.0, "tokens": 1},
            "dream/speed/2.9/1": fast | {"tokens_per_s": 500.0},
            "qwen/speed/1/1": fast | {"tokens_per_s": 250.0},
        },
        "skipped": {"dream/profile/64": "made up"},
    }
    text = "\n".join(steps.markdown(report))
    assert "| dream, 4 blocks of 32, 1 request: step / qwen's: at most 1.25 | 1.2 | met |" in text
    assert "| dream at 2.9 tokens per forward / qwen, batch 1: at least 2.5 | 2 | missed |" in text
    assert "batch 2: at least 2.5 |  | not measured |" in text
    # 14.14 GB of weights and 512 cached positions at 4300 GB/s.
    floor = (14.140571648e9 + 57344 * 512) / 4300e9 * 1e3
    row = f"| dream | 512 | 4 | 1 | 4.8 | {floor:.4g} | {4.8 / floor:.4g} | 1.2 |"
    assert row in text
    assert "`dream/profile/64` skipped: made up" in text and "None" not in text


def test_named_ranges_of_a_trace_are_no_work():
    on_cpu = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=on_cpu) as traced,
        torch.profiler.record_function("a named range"),
    ):
        torch.ones(3) @ torch.ones(3)
    assert "a named range" in {event.name for event in traced.events()}
    spans = steps.spans_of(traced.events())
    assert "aten::dot" in {span.name for span in spans}
    assert "a named range" not in {span.name for span in spans}
    assert not any(span.on_device for span in spans)
