# SPDX-License-Identifier: Apache-2.0
"""The engine says what the reference says, with as many forwards, however the batch is made up."""

import random
from dataclasses import asdict, replace

import pytest
from common import MAX_LEN, WINDOW, check, grid_answers, grid_cases, random_prompts

from benchmarks.parity import (
    GRID,
    Case,
    engine_answers,
    load_forward,
    make_cases,
    reference_answers,
    sampling_params,
    shut_down,
    start_engine,
)
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.reference import generate
from vllm_d2f.sampling.sample import Sampling


@pytest.fixture(scope="module", params=["dream", "llada"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def cases():
    return grid_cases()


@pytest.fixture(scope="module")
def expected(model):
    return grid_answers(model)


@pytest.fixture(scope="module")
def llm(model):
    llm = start_engine(model, window=WINDOW, max_model_len=MAX_LEN)
    yield llm
    shut_down(llm)


@pytest.mark.parametrize("way", ["batch", "arrivals"])
def test_every_setting(llm, cases, expected, way):
    check(cases, expected, engine_answers(llm, cases, way, seed=5))


def test_one_by_one(llm, cases, expected):
    check(cases[::3], expected[::3], engine_answers(llm, cases[::3], "single"))


RULES = [
    ("threshold", 0.5), ("frechet", 0.0), ("frechet", 0.6), ("factor", 0.0), ("factor", 0.7),
    ("entropy", 0.2), ("entropy", 1.2), ("entropy", 2.5), ("leftmost", 0.5), ("leftmost", 1.0),
]  # fmt: skip


@pytest.mark.parametrize("way", ["batch", "arrivals"])
def test_a_batch_of_all_acceptance_rules(llm, model, way):
    """Each row is decoded by its own rule, and no rule decodes as another one does."""
    shapes = [(16, 4, 1), (8, 2, 1), (8, 4, 3)]
    cases = [
        Case(tuple(prompt), D2FParams(size, blocks, 0.1, 0.95, tau, fewest, rule), 48)
        for prompt, (size, blocks, fewest) in zip(random_prompts(3, seed=8), shapes, strict=True)
        for rule, tau in RULES
    ]
    expected = reference_answers(model, cases, MAX_LEN)
    check(cases, expected, engine_answers(llm, cases, way, seed=6))
    first = [(e.answer.tokens, e.answer.forwards) for e in expected[: len(RULES)]]
    assert len({forwards for _, forwards in first}) >= 4
    # Without the others the default is computed alone again.
    step = len(RULES)
    check(cases[::step], expected[::step], engine_answers(llm, cases[::step], "batch"))


def test_last_block_cut_by_the_models_length(llm, model):
    rng = random.Random(4)
    cases = [
        Case(tuple(rng.randrange(200) for _ in range(length)), params, 500)
        for length in (MAX_LEN - 1, MAX_LEN - 5, MAX_LEN - 21, MAX_LEN - 40)
        for params in (D2FParams(16, 4, 0.1, 0.95, 0.5), D2FParams(8, 2, 0.1, 0.95, 0.9))
    ]
    check(cases, reference_answers(model, cases, MAX_LEN), engine_answers(llm, cases, "batch"))


def test_max_tokens_inside_a_block_and_of_one(llm, model):
    prompts = random_prompts(6, seed=11)
    cases = [
        Case(tuple(p), D2FParams(16, 4, 0.1, 0.95, 0.8), n)
        for p, n in zip(prompts, (1, 2, 15, 17, 31, 33), strict=True)
    ]
    check(cases, reference_answers(model, cases, MAX_LEN), engine_answers(llm, cases, "batch"))


def test_mask_tokens_in_prompts(llm, model):
    mixed = [[t for token in p for t in (token, 198)] for p in random_prompts(9, 41, longest=20)]
    cases = [Case(tuple(p), D2FParams(8, 4, 0.1, 0.95, 0.7), 24) for p in mixed]
    # Nothing but masks: every position looks alike, so some of these are decided by ties.
    cases += [Case((198,) * n, D2FParams(8, 4, 0.1, 0.95, 0.7), 24) for n in (1, 8, 30)]
    got = engine_answers(llm, cases, "batch")
    check(cases, reference_answers(model, cases, MAX_LEN), got, decisive=0.6)
    assert all(answer.tokens for answer in got)


def test_seeded_draws_equal_the_references_in_any_batch(llm, model):
    from vllm import SamplingParams

    forward, config = load_forward(model)
    prompts = random_prompts(10, seed=21)
    rules = [dict(temperature=0.8), dict(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02)]
    plain = D2FParams(8, 4, 0.1, 0.95, 0.6)
    requests, expected = [], []
    for index, prompt in enumerate(prompts):
        rule = rules[index % 2]
        params = replace(plain, tau_conf=1.0, accept="entropy") if index % 4 > 1 else plain
        requests.append(
            SamplingParams(
                **rule,
                seed=1000 + index,
                max_tokens=32,
                detokenize=False,
                extra_args={f"d2f_{name}": value for name, value in asdict(params).items()},
            )
        )
        sampling = Sampling.greedy(1)
        sampling.temperature_R[0] = rule["temperature"]
        sampling.top_k_R[0] = rule.get("top_k", 0)
        sampling.top_p_R[0] = rule.get("top_p", 1.0)
        sampling.min_p_R[0] = rule.get("min_p", 0.0)
        sampling.seed_R[0] = 1000 + index
        expected.append(
            generate(
                forward,
                prompt,
                params,
                max_tokens=32,
                mask_id=config.mask_token_id,
                ends=config.end_token_ids,
                shift=config.logits_shift,
                sampling=sampling,
            )
        )
    inputs = [{"prompt_token_ids": p} for p in prompts]
    together = llm.generate(inputs, requests, use_tqdm=False)
    alone = [
        llm.generate([i], [r], use_tqdm=False)[0]
        for i, r in zip(inputs[:3], requests[:3], strict=True)
    ]
    for output, (tokens, forwards) in zip(together, expected, strict=True):
        assert list(output.outputs[0].token_ids) == tokens
        assert denoising_forwards(output.outputs[0]) == forwards
    for one, all_ in zip(alone, together, strict=False):
        assert one.outputs[0].token_ids == all_.outputs[0].token_ids
    # Another seed, another text; no seed, not the same text twice.
    other = [
        SamplingParams(temperature=0.8, max_tokens=32, detokenize=False, seed=s) for s in (1, 2)
    ]
    texts = {
        tuple(llm.generate([inputs[0]], [s], use_tqdm=False)[0].outputs[0].token_ids)
        for s in other + [SamplingParams(temperature=0.8, max_tokens=32, detokenize=False)] * 2
    }
    assert len(texts) == 4


def test_stop_token_and_ignore_eos(llm, model, cases, expected):
    """A stop token closes the window like an end token; ignored end tokens do not."""
    from vllm import SamplingParams

    case = Case(tuple(random_prompts(1, seed=31)[0]), D2FParams(8, 4, 0.1, 0.95, 0.6), 40)
    forward, config = load_forward(model)
    common = dict(max_tokens=40, mask_id=config.mask_token_id, shift=config.logits_shift)
    free, _ = generate(forward, case.prompt, case.params, ends=[], **common)
    stop = free[20]
    first, forwards = generate(forward, case.prompt, case.params, ends=[stop], **common)
    extra = sampling_params(case).extra_args
    requests = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args=extra),
        SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[stop], extra_args=extra
        ),
    ]
    for request in requests:
        request.detokenize = False
    inputs = [{"prompt_token_ids": list(case.prompt)}] * 2
    unstopped, stopped = llm.generate(inputs, requests, use_tqdm=False)
    assert list(unstopped.outputs[0].token_ids) == free
    assert list(stopped.outputs[0].token_ids) == first
    assert stopped.outputs[0].finish_reason == "stop"
    assert denoising_forwards(stopped.outputs[0]) == forwards


def test_abort_leaves_nothing_behind(llm, model, cases, expected):
    engine = llm.llm_engine
    for index, case in enumerate(cases[:20]):
        engine.add_request(
            f"abort-{index}", {"prompt_token_ids": list(case.prompt)}, sampling_params(case)
        )
    for index in range(20):
        engine.step()
        engine.abort_request([f"abort-{index}"])
    while engine.has_unfinished_requests():
        engine.step()
    check(cases[:8], expected[:8], engine_answers(llm, cases[:8], "batch"))
    worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
    states = worker.model_runner.model_state.states
    assert states.preempted == {}
    assert len(states.slots) <= 8  # the last batch is forgotten with the next step


def test_only_masked_rows_reach_the_head(llm, model, monkeypatch):
    """Logits are made for masked positions, and never all of them at once in float32."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    proposals = worker.model_runner.sampler.proposals
    states, seen, masked = worker.model_runner.model_state.states, [], []
    project, list_rows = proposals.project, proposals._rows

    def counting_project(hidden):
        seen.append(len(hidden))
        return project(hidden)

    def counting_rows(masked_DW, queries):
        rows, end_D = list_rows(masked_DW, queries)
        window = states.window.rows(queries.slot_D)
        assert window.masked_RW[rows.request_N, rows.column_N].all()
        masked.append(int(window.masked_RW.sum()))
        return rows, end_D

    monkeypatch.setattr(proposals, "project", counting_project)
    monkeypatch.setattr(proposals, "_rows", counting_rows)
    monkeypatch.setattr(proposals, "rows_per_chunk", 16)
    cases = make_cases(random_prompts(3, seed=2), [D2FParams(8, 4, 0.1, 0.95, 0.6)], 32)
    answers = engine_answers(llm, cases, "batch")
    assert max(seen) <= 16
    assert sum(seen) == sum(masked)
    assert sum(masked) < 32 * sum(a.forwards for a in answers)


@pytest.mark.slow
def test_every_setting_on_many_prompts(llm, model):
    cases = make_cases(random_prompts(20, seed=100), GRID, 48)
    check(cases, reference_answers(model, cases, MAX_LEN), engine_answers(llm, cases, "batch"))
