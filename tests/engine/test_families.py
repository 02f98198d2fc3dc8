# SPDX-License-Identifier: Apache-2.0
"""SDAR and LLaDA2.0, served from folders in their official layouts, against their own code.

One engine per family has few pages, a small budget of tokens and a prefix cache, so that prompts
come in chunks, requests are preempted, and the second round finds pages.
"""

import pytest
from common import check
from published_runs import DATA, published_runs

from benchmarks.harness.engine import core_of, greedy, preemptions, shut_down, start_engine
from benchmarks.parity import Case, engine_answers, reference_answers
from vllm_d2f.metrics import denoising_forwards

MAX_LEN, PAGE = 128, 32


@pytest.fixture(scope="module", params=["sdar", "llada2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def llm(family):
    llm = start_engine(
        str(DATA / family),
        window=64,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=64,
        block_size=PAGE,
        num_gpu_blocks_override=2 * MAX_LEN // PAGE,
        enable_prefix_caching=True,
        disable_log_stats=False,
    )
    yield llm
    shut_down(llm)


def test_authors_runs(family, llm):
    """In two rounds: tokens and forwards of the reference, and those of the published loop."""
    runs = published_runs(family)
    cases = [Case(run.prompt, run.params, len(run.answer)) for run in runs]
    expected = reference_answers(str(DATA / family), cases, MAX_LEN)
    assert [known.answer.tokens for known in expected] == [run.answer for run in runs]
    for way in ("batch", "arrivals"):
        check(cases, expected, engine_answers(llm, cases, way, seed=5))
    to_the_end = [greedy(run.goal, run.params, ignore_eos=True) for run in runs]
    prompts = [{"prompt_token_ids": list(run.prompt)} for run in runs]
    outputs = llm.generate(prompts, to_the_end, use_tqdm=False)
    for run, output in zip(runs, outputs, strict=True):
        completion = output.outputs[0]
        assert tuple(completion.token_ids[: len(run.answer)]) == run.answer
        assert run.forwards in (None, denoising_forwards(completion))
    assert preemptions(llm) > 0
    longest = max(zip(cases, expected, strict=True), key=lambda pair: len(pair[0].prompt))
    again = [[one] * 2 for one in longest]
    check(*again, engine_answers(llm, again[0], "single"))
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:prefix_cache_hits"].value > 0
    assert core_of(llm).scheduler.max_num_scheduled_tokens == 64
