# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion families in their official layouts, against the runs of their own code.

One engine per family has few pages, a small budget of tokens and a prefix cache, so that prompts
come in chunks, requests are preempted, and the second round finds pages.
"""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import rules
from checkpoints import write_dream_reasoner, write_sdar_moe
from common import check
from published_runs import DATA, END, published_runs
from rules import Rule
from rules import engine_answers as engine_answers_of
from test_sampling import OPTIONS
from test_sampling import check as check_rules

from benchmarks.harness.engine import greedy, preemptions, shut_down, start_engine
from benchmarks.parity import GRID, Case, engine_answers, reference_answers
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards

MAX_LEN, WINDOW, PAGE, MASK = 144, 128, 32, 199
PIPELINED = [params for params in GRID if params.max_blocks < 8]


@pytest.fixture(
    scope="module",
    params=[
        "sdar",
        "llada2",
        "fast_dllm_v2",
        "stable_diffcoder",
        pytest.param("sdar_moe", marks=pytest.mark.slow),
        pytest.param("dream_reasoner", marks=pytest.mark.slow),
    ],
)
def model(request, tmp_path_factory):
    if request.param == "sdar_moe":
        return str(write_sdar_moe(tmp_path_factory.mktemp("sdar_moe"), tokenizer=False))
    if request.param == "dream_reasoner":
        return str(write_dream_reasoner(tmp_path_factory.mktemp("dream_reasoner")))
    return str(DATA / request.param)


@pytest.fixture(scope="module")
def llm(model):
    llm = start_engine(
        model,
        window=WINDOW,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=MAX_LEN,  # the least with asynchronous scheduling
        block_size=PAGE,
        num_gpu_blocks_override=2 * MAX_LEN // PAGE,
        enable_prefix_caching=True,
        disable_log_stats=False,
    )
    yield llm
    shut_down(llm)


def as_published(model, params):
    """With what the loop of the model's family has beside D2F's settings."""
    if model.endswith("fast_dllm_v2"):
        return replace(params, sub_block_size=params.block_size // 4)
    if model.endswith("stable_diffcoder"):
        return replace(params, cut_last_block=1)
    return params


def random_prompt(rng, length):
    return tuple(rng.randrange(200) for _ in range(length))


def prompt_lengths(size):
    """Shorter than a block, one block, on a border and off it."""
    return (1, size, 2 * size, 2 * size + 1, 3 * size - 1)


def compare(llm, model, cases, ways=("batch",)):
    expected = reference_answers(model, cases, MAX_LEN)
    for way in ways:
        check(cases, expected, engine_answers(llm, cases, way, seed=5))
    return expected


def test_authors_runs(model, llm):
    """Tokens and forwards of the reference, and those of the published loop."""
    if Path(model).parent != DATA:
        pytest.skip("no runs of the authors' code")
    runs = published_runs(model.rpartition("/")[2])
    runs = [run for run in runs if len(run.prompt) + len(run.answer) <= MAX_LEN]
    # Where the last block is cut, what the request wants says where; LLaDA2.0 may give more.
    goals = [run.goal if run.params.cut_last_block else len(run.answer) for run in runs]
    cases = [Case(run.prompt, run.params, goal) for run, goal in zip(runs, goals, strict=True)]
    expected = compare(llm, model, cases, ("batch", "arrivals"))
    assert [known.answer.tokens for known in expected] == [run.answer for run in runs]
    to_the_end = [greedy(run.goal, run.params, ignore_eos=True) for run in runs]
    prompts = [{"prompt_token_ids": list(run.prompt)} for run in runs]
    outputs = llm.generate(prompts, to_the_end, use_tqdm=False)
    for run, output in zip(runs, outputs, strict=True):
        completion = output.outputs[0]
        assert tuple(completion.token_ids[: len(run.answer)]) == run.answer
        assert run.forwards in (None, denoising_forwards(completion))
    assert preemptions(llm) > 0
    long = Case(random_prompt(random.Random(7), 2 * PAGE + 5), cases[0].params, 16)
    compare(llm, model, [long, long], ("single",))
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:prefix_cache_hits"].value > 0


def test_pipelined_window(model, llm):
    """Several open blocks: every setting with one of the prompt lengths."""
    rng = random.Random(3)
    cases = []
    for index, params in enumerate(PIPELINED):
        params = as_published(model, params) if index % 4 else params
        length = prompt_lengths(params.block_size)[index % 5]
        cases.append(Case(random_prompt(rng, length), params, rng.choice((1, 17, 40))))
    compare(llm, model, cases)


def test_edges(model, llm):
    """Mask and end tokens in the prompt's own block, and answers that end inside a block."""
    rng, cases = random.Random(4), []
    for size, blocks, fewest in itertools.product((4, 16), (1, 4), (1, 3)):
        params = D2FParams(size, blocks, tau_conf=0.6, min_per_step=fewest)
        if model.endswith("fast_dllm_v2"):
            params = D2FParams(size, blocks, tau_add=1 / fewest, tau_conf=0.6)
        params = as_published(model, params)
        head = random_prompt(rng, size)
        for tail in ((MASK,), (END,), (MASK, END, MASK), (5, MASK)):
            for max_tokens in (1, size - len(tail), size + 1):
                cases.append(Case((*head, *tail), params, max(max_tokens, 1)))
        cases.append(Case((MASK,), params, 2 * size))
        cases.append(Case((END,), params, 2 * size))
    compare(llm, model, cases)


def test_sampling_parameters(model, llm):
    """Those of `test_sampling`, in prompts whose tail shares a block with the answer."""
    rng, asked = random.Random(8), []
    for index, options in enumerate(OPTIONS.values()):
        if 199 in options.get("allowed_token_ids", ()):  # Dream's end token is the mask here
            options = options | {"allowed_token_ids": [*range(40, 90), END]}
        if 199 in options.get("logit_bias", {}):
            options = options | {"logit_bias": {END: 8.0}}
        words = ((73, 8), (41,)) if index % 3 == 0 else ()
        asked.append(Rule(random_prompt(rng, 8 + index % 8), options, words))
    check_rules(
        asked, rules.reference_answers(model, asked, MAX_LEN), engine_answers_of(llm, asked)
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_every_setting_with_every_prompt_length(model, llm, size):
    rng, cases = random.Random(6), []
    settings = [params for params in PIPELINED if params.block_size == size]
    both = [*settings, *(as_published(model, params) for params in settings)]
    for params in dict.fromkeys(both):
        for length, max_tokens in itertools.product(prompt_lengths(size), (17, 40)):
            cases.append(Case(random_prompt(rng, length), params, max_tokens))
    compare(llm, model, cases, ("batch", "arrivals"))
