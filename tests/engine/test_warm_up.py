# SPDX-License-Identifier: Apache-2.0
"""The steps before the first request: vLLM runs them on CUDA only, here the test does."""

from types import SimpleNamespace

import pytest
from common import MAX_LEN, check, random_prompts

from benchmarks.parity import (
    engine_answers,
    make_cases,
    reference_answers,
    shut_down,
    start_engine,
)
from vllm_d2f.d2f import D2FParams
from vllm_d2f.worker.warmup import KINDS, STEPS, warm_up

SECTION = {"block_size": 8, "max_blocks": 4}


def make_engine(model, **options):
    options = {"max_model_len": MAX_LEN, "window": 32} | options
    llm = start_engine(model, additional_config={"d2f": SECTION}, **options)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return llm, worker


def watched(worker):
    """`execute_model` that notes each step: prompts, windows, and those in both."""
    steps = []

    def execute(output):
        new = {data.req_id for data in output.scheduled_new_reqs}
        windows = set(output.scheduled_spec_decode_tokens)
        if output.total_num_scheduled_tokens:
            steps.append((len(new - windows), len(new & windows), len(windows - new)))
        return worker.execute_model(output)

    return execute, steps


@pytest.mark.parametrize("ahead", [False, True])
def test_every_kind_of_step_and_nothing_is_left(dream, ahead):
    from vllm.v1.worker import gpu_worker

    llm, worker = make_engine(dream, async_scheduling=ahead)
    runner = worker.model_runner
    states = runner.model_state.states
    seen = set()
    write = runner.sampler.apply_staged_writes
    runner.sampler.apply_staged_writes = lambda: (
        seen.update(
            (slot in states.drawing, slot in states.truncating, slot in states.samplers)
            for slot in states.slots.values()
        ),
        write(),
    )
    execute, steps = watched(worker)
    gpu_worker.warmup_kernels(runner, execute, worker.sample_tokens)  # p13 calls `state.warm_up`
    del runner.sampler.apply_staged_writes
    assert len(steps) == STEPS
    assert steps[0] == (1, 0, 0) and steps[1] == (0, len(KINDS) - 2, 1)
    assert steps[2] == (0, 1, len(KINDS) - 1) and steps[3] == (0, 0, len(KINDS))
    # Greedy, drawn with limits, drawn without, and with rules of its own.
    assert seen == {(0, 0, 0), (1, 1, 0), (1, 0, 0), (0, 0, 1)}
    assert runner.req_states.req_id_to_index == {} and states.slots == {} and states.preempted == {}
    assert states.samplers == {} and not states.drawing and not states.truncating
    cases = make_cases(random_prompts(6, seed=3), [D2FParams(8, 4, 0.1, 0.95, 0.6)], 40)
    expected = reference_answers(dream, cases, MAX_LEN)
    check(cases, expected, engine_answers(llm, cases, "batch"))
    shut_down(llm)


def test_few_slots_pages_and_positions(dream):
    """Whatever fits is run, and an engine without room starts all the same."""
    llm, worker = make_engine(dream, max_model_len=20, max_num_seqs=2, max_num_batched_tokens=40)
    execute, steps = watched(worker)
    warm_up(worker.model_runner, execute, worker.sample_tokens)
    assert steps[:3] == [(1, 0, 0), (0, 0, 1), (0, 1, 1)]
    config = worker.model_runner.kv_cache_config
    before, steps[:] = config.num_blocks, []
    config.num_blocks = 1
    warm_up(worker.model_runner, execute, worker.sample_tokens)
    assert steps == []
    config.num_blocks = before
    longest, worker.model_runner.max_model_len = worker.model_runner.max_model_len, 3
    warm_up(worker.model_runner, execute, worker.sample_tokens)
    assert steps == []
    worker.model_runner.max_model_len = longest
    case = make_cases([[5, 6, 7]], [D2FParams(8, 4, 0.1, 0.95, 0.6)], 10)
    check(case, reference_answers(dream, case, 20), engine_answers(llm, case, "batch"), decisive=0)
    shut_down(llm)


def test_other_models_keep_vllms_own():
    from vllm_d2f.patches.p13_warm_up import TARGET, p13_warm_up

    called = []
    patched = p13_warm_up.wrap(TARGET, lambda *args: called.append(args))
    runner = SimpleNamespace(model_state=object())
    patched(runner, 1, 2)
    assert called == [(runner, 1, 2)]
