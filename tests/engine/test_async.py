# SPDX-License-Identifier: Apache-2.0
"""Asynchronous scheduling changes when things happen, not what is decided.

A step is scheduled before the result of the one before it is known. `make test-async`
runs every other engine test this way too.
"""

import pytest
from common import MAX_LEN, check, grid_answers, grid_cases, random_prompts
from rules import Rule
from rules import engine_answers as rule_answers

from benchmarks.parity import (
    Answer,
    Case,
    engine_answers,
    load_forward,
    preemptions,
    reference_answers,
    sampling_params,
    shut_down,
    start_engine,
)
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards, request_trace
from vllm_d2f.reference import decode

WINDOW = 64


@pytest.fixture(scope="module")
def cases():
    """Settings of the grid, and answers whose windows are as wide as the engine has them."""
    prompts = random_prompts(8, seed=12)
    widest = (D2FParams(32, 2, 0.1, 0.95, 0.9), D2FParams(16, 4), D2FParams(64, 1), D2FParams(8, 8))
    full = [Case(tuple(p), widest[i % 4], 150) for i, p in enumerate(prompts)]
    return full + [case for case in grid_cases() if fits(case)]


def fits(case):
    return case.params.window <= WINDOW


@pytest.fixture(scope="module")
def expected(dream, cases):
    known = zip(grid_cases(), grid_answers(dream), strict=True)
    return reference_answers(dream, cases[:8], MAX_LEN) + [k for case, k in known if fits(case)]


@pytest.fixture(scope="module")
def llm(dream):
    """Pages are scarce and shared: requests are preempted all the time."""
    llm = start_engine(
        dream,
        window=WINDOW,
        max_model_len=MAX_LEN,
        num_gpu_blocks_override=-(-MAX_LEN // 32) + 8,
        max_num_seqs=24,
        enable_prefix_caching=True,
        async_scheduling=True,
    )
    yield llm
    shut_down(llm)


def parts(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler, core.model_executor.driver_worker.worker.model_runner


@pytest.mark.parametrize("way", ["batch", "arrivals"])
def test_every_setting_with_preemptions(llm, cases, expected, way):
    before = preemptions(llm)
    check(cases, expected, engine_answers(llm, cases, way, seed=5))
    assert preemptions(llm) > before
    scheduler, runner = parts(llm)
    assert runner.model_state.states.preempted == {} and scheduler.preempted_in_flight == set()
    assert scheduler.streams == {}


def test_steps_are_scheduled_ahead_and_no_wider_than_needed(llm, cases, expected):
    """Most steps are scheduled while one runs; they hold what is open and at most a block more,
    beside what was committed.
    """
    scheduler, _ = parts(llm)
    seen, width = [], scheduler._width

    def watched(request):
        stream = scheduler.streams[request.request_id]
        positions = width(request)
        known = stream.committed_in_flight + stream.open
        assert positions <= known + stream.in_flight * stream.block_size
        seen.append(stream.in_flight)
        return positions

    scheduler._width = watched
    try:
        check(cases[:6], expected[:6], engine_answers(llm, cases[:6], "batch"))
    finally:
        del scheduler._width
    assert set(seen) <= {0, 1} and sum(seen) > 0.8 * len(seen)


def test_a_requests_options_are_read_once(llm, cases, monkeypatch):
    """The scheduler parses and checks them when a request arrives, and not in every step."""
    from vllm_d2f.scheduler import scheduler

    calls, read = [], scheduler.request_params

    def counted(*args):
        calls.append(args)
        return read(*args)

    monkeypatch.setattr(scheduler, "request_params", counted)
    engine_answers(llm, cases[:3], "batch")
    assert len(calls) == 3


def test_last_block_cut_by_the_models_length(llm, dream):
    prompts = random_prompts(6, seed=4, longest=2)
    lengths = (MAX_LEN - 1, MAX_LEN - 5, MAX_LEN - 21, MAX_LEN - 40, MAX_LEN - 64, MAX_LEN - 33)
    cases = [
        Case(tuple((prompt * length)[:length]), params, 500)
        for prompt, length in zip(prompts, lengths, strict=True)
        for params in (D2FParams(16, 4, 0.1, 0.95, 0.5), D2FParams(8, 2, 0.1, 0.95, 0.9))
    ]
    got = engine_answers(llm, cases, "batch")
    check(cases, reference_answers(dream, cases, MAX_LEN), got, decisive=0.5)


def test_aborts_while_a_step_runs(llm, cases, expected):
    engine = llm.llm_engine
    for index, case in enumerate(cases[:12]):
        engine.add_request(
            f"abort-{index}", {"prompt_token_ids": list(case.prompt)}, sampling_params(case)
        )
    for index in range(12):
        engine.step()
        engine.abort_request([f"abort-{index}"])
    while engine.has_unfinished_requests():
        engine.step()
    check(cases[:8], expected[:8], engine_answers(llm, cases[:8], "batch"))
    scheduler, runner = parts(llm)
    assert runner.model_state.states.preempted == {} and scheduler.streams == {}


def test_everything_preempted_while_a_step_runs(llm, cases, expected):
    """As the reset of the prefix cache does it: what is under way is not lost."""
    engine = llm.llm_engine
    scheduler, _ = parts(llm)
    for index, case in enumerate(cases[:8]):
        engine.add_request(
            str(index), {"prompt_token_ids": list(case.prompt)}, sampling_params(case)
        )
    outputs, steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = output.outputs[0]
        steps += 1
        if steps in (3, 8, 13):
            scheduler.reset_prefix_cache(reset_running_requests=True)
            assert scheduler.preempted_in_flight, "nothing was under way"
    got = [
        Answer(tuple(out.token_ids), denoising_forwards(out))
        for out in (outputs[str(index)] for index in range(8))
    ]
    check(cases[:8], expected[:8], got)


def test_trace(llm, dream):
    """When each token was decided comes with the step's result."""
    forward, config = load_forward(dream)
    chosen = [case for case in grid_cases() if 32 <= case.params.window <= WINDOW][:8]
    requests = []
    for case in chosen:
        params = sampling_params(case)
        params.extra_args["d2f_trace"] = 1
        requests.append(params)
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in chosen]
    clear = 0
    for case, output in zip(chosen, llm.generate(prompts, requests, use_tqdm=False), strict=True):
        frames = list(
            decode(
                forward,
                case.prompt,
                case.params,
                max_tokens=case.max_tokens,
                mask_id=config.mask_token_id,
                ends=config.end_token_ids,
                shift=config.logits_shift,
                max_len=MAX_LEN,
            )
        )
        if min(frame.margin for frame in frames) <= 2e-5:
            continue
        clear += 1
        trace = request_trace(output)
        decided_at = {p: frame.forward for frame in frames for p in frame.accepted}
        assert trace.decided_at == [decided_at[p] for p in range(len(frames[-1].tokens))]
        assert trace.forwards == len(frames)
    assert clear >= 4


def test_seeds_logprobs_and_rules(llm):
    """The same texts, log-probabilities and forwards alone (nothing preempted) and together."""
    options = [
        dict(temperature=0.8, seed=3),
        dict(logprobs=3),
        dict(frequency_penalty=1.5, ignore_eos=True),
        dict(temperature=1.1, top_k=20, seed=4, min_tokens=20),
    ]
    prompts = random_prompts(8, seed=9)
    rules = [Rule(tuple(p), options[i % 4], max_tokens=48) for i, p in enumerate(prompts)]
    alone = [rule_answers(llm, [rule])[0] for rule in rules]
    together = rule_answers(llm, rules + [Rule(r.prompt, {}, max_tokens=60) for r in rules])
    for one, other in zip(alone, together, strict=False):
        assert one.tokens == other.tokens and one.forwards == other.forwards
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
