# SPDX-License-Identifier: Apache-2.0
"""The adaptive window: whatever it chose, the reference says the same with the same widths."""

import itertools
import random

import numpy as np
import pytest
from checkpoints import toy_family, write_toy
from common import MAX_LEN, WINDOW, grid_cases, random_prompts
from rules import Rule, reference_frames
from vllm.exceptions import VLLMValidationError

from benchmarks.harness.engine import preemptions
from benchmarks.parity import load_forward, shut_down, start_engine
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards, request_trace
from vllm_d2f.scheduler import adaptive

OPTIONS = (
    {},
    {"temperature": 0.9, "seed": 3},
    {"logprobs": 2},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 0},
    {"min_tokens": 12},
    {"logit_bias": {7: 4.0}},
)
OWN_SAMPLER = {"logprobs", "repetition_penalty", "min_tokens", "logit_bias"}
SERVED = {"d2f": {"block_size": 8, "max_blocks": 4, "adaptive_window": True}}


@pytest.fixture(scope="module", params=["dream", "llada", "toy"])
def model(request, tmp_path_factory):
    if request.param != "toy":
        yield request.getfixturevalue(request.param)
        return
    with toy_family():  # blocks from position 0 on
        path = write_toy(tmp_path_factory.mktemp("toy"), tokenizer=False, head_scale=8.0)
        yield str(path)


@pytest.fixture(scope="module")
def llm(model):
    llm = start(model)
    yield llm
    shut_down(llm)


def start(model, **options):
    options = {"enable_prefix_caching": True, "async_scheduling": False} | options
    section = {"d2f": SERVED["d2f"] | {"window": WINDOW}}
    return start_engine(
        model, window=WINDOW, max_model_len=MAX_LEN, additional_config=section, **options
    )


def at_random(seed):
    """Return a choice that no cost explains, so that windows of every width occur."""
    rng = np.random.default_rng(seed)

    def choose(gain_RJ, size_RJ, least_R, cost, others):
        open_R = (size_RJ > 0).sum(1)
        return np.minimum(rng.integers(least_R, np.maximum(open_R, least_R) + 1), open_R)

    return choose


def rules():
    """Return every setting of the grid, with all kinds of requests."""
    prompts = random_prompts(8, seed=2)
    cases = [
        Rule(case.prompt, OPTIONS[i % len(OPTIONS)], params=case.params, max_tokens=48)
        for i, case in enumerate(grid_cases())
    ]
    return cases + [Rule(tuple(p), {}, params=D2FParams(4, 8, 0, 0, 0.3)) for p in prompts]


def answers(llm, rules):
    prompts = [{"prompt_token_ids": list(rule.prompt)} for rule in rules]
    params = [rule.sampling_params() for rule in rules]
    for one in params:
        one.extra_args["d2f_trace"] = 1
    return llm.generate(prompts, params, use_tqdm=False)


def check(model, rules, outputs):
    """Check that the reference, given the trace's widths, has equal tokens, forwards and values.

    Only the margin of a plain greedy request tells whether rounding may have decided. So of those
    with a sampler of their own a few may differ, on a random model that is sure of nothing.
    """
    loaded, compared, unsure = load_forward(model), 0, []
    for rule, output in zip(rules, outputs, strict=True):
        trace, answer = request_trace(output), output.outputs[0]
        frames = list(
            reference_frames(
                loaded,
                rule.prompt,
                rule.params,
                rule.sampling_params(),
                max_len=MAX_LEN,
                window=rule.params.window,
                widths=trace.widths + [WINDOW] * 64,
            )
        )
        said = (list(answer.token_ids), denoising_forwards(answer), len(trace.widths))
        equal = said == (frames[-1].tokens, len(frames), len(frames))
        if not equal and min(frame.margin for frame in frames) < 2e-5:
            continue  # rounding may have decided
        if not equal and rule.options.keys() & OWN_SAMPLER:
            unsure.append(rule)
            continue
        assert equal, rule
        compared += 1
        decided_at = {p: frame.forward for frame in frames for p in frame.accepted}
        assert trace.decided_at == [decided_at[p] for p in range(len(frames[-1].tokens))]
        if answer.logprobs:
            values = [e[t].logprob for e, t in zip(answer.logprobs, answer.token_ids, strict=True)]
            assert values == pytest.approx(frames[-1].logprobs, rel=1e-4, abs=1e-4)
    assert compared > 0.8 * len(rules) and len(unsure) <= 0.08 * len(rules), unsure


def test_any_choice_equals_the_reference(llm, model, monkeypatch):
    monkeypatch.setattr(adaptive, "choose", at_random(0))
    asked = rules()
    random.Random(0).shuffle(asked)
    outputs = answers(llm, asked)
    widths = [request_trace(output).widths for output in outputs]
    assert len({width for each in widths for width in each}) > 5
    check(model, asked, outputs)


def test_its_own_choice_equals_the_reference(llm, model):
    """And again with prefix reuse: the second time every prompt is in the cache."""
    asked = rules()[::4]
    for _ in range(2):
        check(model, asked, answers(llm, asked))


def test_streams_forward_by_forward_what_the_reference_decodes(llm, model, monkeypatch):
    """After each forward a request has emitted what the reference has decoded without a gap."""
    monkeypatch.setattr(adaptive, "choose", at_random(3))
    asked = [rule for rule in rules() if not rule.options][::2]
    for index, rule in enumerate(asked):
        params = rule.sampling_params()
        params.extra_args["d2f_trace"] = 1
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": list(rule.prompt)}, params)
    requests = llm.llm_engine.engine_core.engine_core.scheduler.requests
    seen, last = {index: [] for index in range(len(asked))}, {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            index, tokens = int(output.request_id), list(output.outputs[0].token_ids)
            if output.finished:
                last[index] = output
                continue
            request = next(r for i, r in requests.items() if i.split("-")[0] == output.request_id)
            seen[index].append((sum(request.spec_decode_metrics.histogram), tokens))
    loaded, parts = load_forward(model), 0
    for index, rule in enumerate(asked):
        frames = list(
            reference_frames(
                loaded,
                rule.prompt,
                rule.params,
                rule.sampling_params(),
                max_len=MAX_LEN,
                window=rule.params.window,
                widths=request_trace(last[index]).widths + [WINDOW] * 64,
            )
        )
        if min(frame.margin for frame in frames) < 2e-5:
            continue  # rounding may decide
        assert list(last[index].outputs[0].token_ids) == frames[-1].tokens
        for forwards, tokens in seen[index]:
            frame = frames[forwards - 1]
            gapless = list(itertools.takewhile(bool, map(int, frame.decided)))
            assert tokens == frame.tokens[: len(gapless)]
            parts += 1
    assert parts > len(asked)


def test_a_request_may_switch_it_off(llm, model):
    rule = Rule(tuple(random_prompts(1, seed=9)[0]), {})
    params = rule.sampling_params()
    params.extra_args |= {"d2f_trace": 1, "d2f_adaptive_window": 0}
    (output,) = llm.generate([{"prompt_token_ids": list(rule.prompt)}], [params], use_tqdm=False)
    assert request_trace(output).widths is None
    params.extra_args["d2f_adaptive_window"] = "maybe"
    with pytest.raises(VLLMValidationError, match="d2f_adaptive_window must be 0 or 1"):
        llm.generate([{"prompt_token_ids": list(rule.prompt)}], [params], use_tqdm=False)


def test_refused_with_asynchronous_scheduling(dream):
    with pytest.raises(ValueError, match="remove --async-scheduling"):
        start(dream, async_scheduling=True)


def test_preemption(model, monkeypatch):
    monkeypatch.setattr(adaptive, "choose", at_random(5))
    llm = start(model, num_gpu_blocks_override=MAX_LEN // 32 + 4, block_size=32, max_num_seqs=16)
    try:
        asked = rules()[::2]
        outputs = answers(llm, asked)
        assert preemptions(llm) > 0
        check(model, asked, outputs)
    finally:
        shut_down(llm)
