# SPDX-License-Identifier: Apache-2.0
"""Blocks from position 0 on: a toy family on Qwen3's layers, the engine against the reference.

The prompt is block-causal, and its last tokens share a block with the answer (the tail). The family
comes from a package of its own (`tests/toy`).
"""

import itertools
import random

import pytest
from checkpoints import toy_family, write_toy
from common import MAX_LEN, WINDOW, check

from benchmarks.harness.engine import preemptions, shut_down, start_engine
from benchmarks.parity import Case, engine_answers, reference_answers
from vllm_d2f.d2f import D2FParams

TAUS = ((0.1, 0.95, 0.9), (0.7, 0.95, 0.6), (0.9, 0.5, 0.3))
GRID = [
    D2FParams(block_size, max_blocks, *taus)
    for block_size, max_blocks, taus in itertools.product((4, 8, 16, 32), (1, 2, 4), TAUS)
]


def prompt_lengths(block_size):
    """Shorter than a block, one block, on a border and off it."""
    return (1, block_size, 2 * block_size, 2 * block_size + 1, 3 * block_size - 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with toy_family():
        # A sharper head: a random one is so unsure that every decision is a forced one.
        path = write_toy(tmp_path_factory.mktemp("toy"), tokenizer=False, head_scale=8.0)
        yield str(path)


@pytest.fixture(scope="module")
def cases():
    """Every setting with one of the prompt lengths; mask and end token stand in prompts too."""
    rng, cases = random.Random(3), []
    for index, params in enumerate(GRID):
        lengths = prompt_lengths(params.block_size)
        prompt = tuple(rng.randrange(200) for _ in range(lengths[index % len(lengths)]))
        cases.append(Case(prompt, params, rng.choice((1, 17, 40))))
    return cases


@pytest.fixture(scope="module")
def expected(model, cases):
    return reference_answers(model, cases, MAX_LEN)


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def llm(request, model):
    llm = start_engine(model, window=WINDOW, max_model_len=MAX_LEN, async_scheduling=request.param)
    yield llm
    shut_down(llm)


@pytest.mark.parametrize("way", ["batch", "arrivals"])
def test_every_setting(llm, cases, expected, way):
    check(cases, expected, engine_answers(llm, cases, way, seed=4))


def test_one_by_one(llm, cases, expected):
    check(cases[::4], expected[::4], engine_answers(llm, cases[::4], "single"))


def test_small_budget_of_tokens(model, cases, expected):
    """Prompts come in chunks that end where blocks end, and the tail waits for its window."""
    llm = start_engine(
        model,
        window=WINDOW,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=WINDOW,
        max_num_seqs=8,
        async_scheduling=False,  # else a step holds a block more at least
    )
    try:
        check(cases, expected, engine_answers(llm, cases, "batch"))
    finally:
        shut_down(llm)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_preemption(model, cases, expected, async_scheduling):
    pages = MAX_LEN // 32 + 4
    llm = start_engine(
        model,
        window=WINDOW,
        max_model_len=MAX_LEN,
        num_gpu_blocks_override=pages,
        async_scheduling=async_scheduling,
    )
    try:
        check(cases, expected, engine_answers(llm, cases, "batch"))
        assert preemptions(llm) > 0
    finally:
        shut_down(llm)


def test_prefix_reuse(model, cases, expected):
    """The second time pages are found, and a longer prompt finds those it begins with."""
    llm = start_engine(model, window=WINDOW, max_model_len=MAX_LEN, enable_prefix_caching=True)
    try:
        check(cases, expected, engine_answers(llm, cases, "batch"))
        check(cases, expected, engine_answers(llm, cases, "batch"))
        longer = [
            Case((*case.prompt, *known.answer.tokens[:-1], 7, 8, 9), case.params, 20)
            for case, known in zip(cases, expected, strict=True)
        ]
        again = reference_answers(model, longer, MAX_LEN)
        check(longer, again, engine_answers(llm, longer, "batch"))
        shared = [
            Case((*range(100, 164), i), D2FParams(8, 2, 0.1, 0.95, 0.6), 12) for i in range(6)
        ]
        check(
            shared, reference_answers(model, shared, MAX_LEN), engine_answers(llm, shared, "single")
        )
        core = llm.llm_engine.engine_core.engine_core
        stats = core.scheduler.kv_cache_manager.make_prefix_cache_stats()
        assert stats is None or stats.hits > 0
    finally:
        shut_down(llm)
