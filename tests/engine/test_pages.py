# SPDX-License-Identifier: Apache-2.0
"""Scarce pages, shared pages, a scarce token budget: the answers stay the reference's.

Each test starts an engine of its own, and there is one engine at a time in a process.
"""

import pytest
from common import MAX_LEN, WINDOW, check, grid_answers, grid_cases, random_prompts

from benchmarks.parity import (
    Case,
    engine_answers,
    preemptions,
    reference_answers,
    sampling_params,
    shut_down,
    start_engine,
)
from vllm_d2f.d2f import D2FParams


@pytest.fixture(scope="module", params=["dream", "llada"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def cases():
    return grid_cases()


@pytest.fixture(scope="module")
def expected(model):
    return grid_answers(model)


def test_small_token_budget_changes_nothing(model, cases, expected):
    """Windows are never cut: a request whose window has no room in a step sits it out."""
    llm = start_engine(
        model, window=WINDOW, max_model_len=MAX_LEN, max_num_batched_tokens=MAX_LEN, max_num_seqs=16
    )
    check(cases, expected, engine_answers(llm, cases, "batch"))
    shut_down(llm)


def test_preemption_changes_nothing(model, cases, expected):
    pages = -(-MAX_LEN // 32) + 8
    llm = start_engine(
        model, window=WINDOW, max_model_len=MAX_LEN, num_gpu_blocks_override=pages, max_num_seqs=24
    )
    check(cases, expected, engine_answers(llm, cases, "batch"))
    assert preemptions(llm) > 0
    state = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert state.model_runner.model_state.states.preempted == {}
    shut_down(llm)


def test_prefix_reuse_changes_nothing(model, cases, expected):
    """The identical prompt shares pages; another prompt with the same beginning must not."""
    llm = start_engine(model, window=WINDOW, max_model_len=MAX_LEN, enable_prefix_caching=True)
    check(cases, expected, engine_answers(llm, cases, "batch"))
    check(cases, expected, engine_answers(llm, cases, "batch"))
    params = D2FParams(8, 4)
    long = tuple(random_prompts(1, seed=9, longest=2)[0] * 100)[:100]
    related = [Case(p, params, 32) for p in (long, long + (7,), long[:64], long, long[:97])]
    check(
        related, reference_answers(model, related, MAX_LEN), engine_answers(llm, related, "batch")
    )
    outputs = llm.generate(
        {"prompt_token_ids": list(long)}, sampling_params(related[0]), use_tqdm=False
    )
    assert outputs[0].num_cached_tokens >= 64
    shut_down(llm)


def test_block_causal_prompts_share_pages(model):
    """Pages of 32 end where prompt blocks of 16 end, so any common beginning can be shared."""
    section = {"block_size": 16, "max_blocks": 2, "prompt_attention": "block_causal"}
    llm = start_engine(
        model,
        window=32,
        max_model_len=MAX_LEN,
        enable_prefix_caching=True,
        additional_config={"d2f": section},
    )
    long = tuple(random_prompts(1, seed=9, longest=2)[0] * 120)[:120]
    prompts = [long, long + (7,), long[:70], long[:64] + (3, 4), long[:97], (5,) + long]
    cases = [Case(p, D2FParams(16, 2), 40) for p in prompts]
    expected = reference_answers(model, cases, MAX_LEN, prompt_block=16)
    for _ in range(2):
        check(cases, expected, [engine_answers(llm, [case], "batch")[0] for case in cases])
    output = llm.generate(
        {"prompt_token_ids": list(long[:64]) + [9] * 9}, sampling_params(cases[0]), use_tqdm=False
    )[0]
    assert output.num_cached_tokens == 64
    shut_down(llm)
