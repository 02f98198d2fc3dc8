# SPDX-License-Identifier: Apache-2.0
"""Tokens leave as soon as all before them are decided; pages go by what is committed."""

import itertools

import pytest
from common import MAX_LEN, WINDOW, grid_cases, random_prompts

from benchmarks.parity import (
    Case,
    load_forward,
    sampling_params,
    shut_down,
    start_engine,
)
from vllm_d2f.admission import MAX_END_TOKENS
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards, request_trace
from vllm_d2f.reference import decode

PAGE = 32


@pytest.fixture(scope="module", params=["dream", "llada"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def frames(model):
    """The reference's frames for each case, without the few that rounding may decide."""
    forward, config = load_forward(model)
    known = []
    for case in grid_cases():
        steps = list(
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
        if min(frame.margin for frame in steps) > 2e-5:
            known.append((case, steps))
    assert len(known) > 40
    return known


@pytest.fixture(scope="module")
def llm(model):
    llm = start_engine(model, window=WINDOW, max_model_len=MAX_LEN, enable_prefix_caching=True)
    yield llm
    shut_down(llm)


def decided_prefix(frame):
    """Tokens before the first undecided position."""
    count = sum(itertools.takewhile(bool, map(int, frame.decided)))
    return frame.tokens[:count]


def add(llm, request_id, case, **options):
    params = sampling_params(case)
    params.extra_args |= options
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(case.prompt)}, params)


def parts(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.scheduler, core.model_executor.driver_worker.worker.model_runner


def test_emits_forward_by_forward_what_the_reference_decodes(llm, frames):
    """After its k-th forward a request has emitted what the reference has decoded without a gap.

    And of each request vLLM counts, files and hashes no more than what is committed by then.
    """
    scheduler, runner = parts(llm)
    try:
        for index, (case, _) in enumerate(frames):
            add(llm, str(index), case)
        counted = count(scheduler)
        early = steps = 0
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                case, known = frames[int(output.request_id)]
                completion = output.outputs[0]
                if output.finished:
                    assert list(completion.token_ids) == known[-1].tokens
                    assert denoising_forwards(completion) == len(known)
                    continue
                request = next(
                    r for i, r in scheduler.requests.items() if i.split("-")[0] == output.request_id
                )
                forwards = sum(request.spec_decode_metrics.histogram)
                frame = known[forwards - 1]
                assert list(completion.token_ids) == decided_prefix(frame)
                steps += 1
                early += len(completion.token_ids) > frame.committed
            for request_id, request in scheduler.requests.items():
                check_accounting(scheduler, runner, request_id, request, frames)
        assert counted == expected_counts(frames)
        assert early > steps / 2, "hardly anything left before its block, so this tested nothing"
    finally:
        vars(scheduler).pop("make_stats", None)


NAMES = ("forwards", "output", "active", "semi", "finished")


def count(scheduler):
    """Return what the scheduler counts for the metrics from now on."""
    total, make_stats = dict.fromkeys(NAMES, 0), scheduler.make_stats

    def watched(*args, **kwargs):
        for name in NAMES:
            value = getattr(scheduler.stats, name)
            total[name] += len(value) if isinstance(value, list) else value
        return make_stats(*args, **kwargs)

    scheduler.make_stats = watched
    return total


def expected_counts(frames):
    total = dict.fromkeys(NAMES, 0)
    for case, known in frames:
        before = 0
        for frame in known:
            for position in frame.accepted:
                block = (position - before) // case.params.block_size
                total["active" if frame.activated[block] else "semi"] += 1
            before = frame.committed
        total["forwards"] += len(known)
        total["output"] += len(known[-1].tokens)
        total["finished"] += 1
    assert total["semi"] > 100
    return total


def check_accounting(scheduler, runner, request_id, request, frames):
    case, known = frames[int(request_id.split("-")[0])]
    forwards = sum(request.spec_decode_metrics.histogram)
    if not forwards:
        return
    # Scheduling ahead, the worker has had one forward more than is accounted for, its queries begin
    # where the one before began, and what the last one committed may be held.
    stream = scheduler.streams[request_id]
    had = min(forwards + stream.in_flight, len(known))
    assert scheduler.async_scheduling or had == forwards and stream.committed_in_flight == 0
    committed = known[forwards - 1].committed - stream.committed_in_flight
    assert list(request.output_token_ids) == known[-1].tokens[:committed]
    assert request.num_computed_tokens == len(case.prompt) + committed
    slot = runner.req_states.req_id_to_index[request_id]
    computed = int(runner.req_states.num_computed_tokens.gpu[slot])
    before = had - 1 - scheduler.async_scheduling
    assert computed == len(case.prompt) + (known[before].committed if before >= 0 else 0)
    total = int(runner.req_states.total_len.gpu[slot])
    sent = len(decided_prefix(known[had - 1]))
    assert total == len(case.prompt) + sent
    said = runner.req_states.all_token_ids.gpu[slot, len(case.prompt) : total]
    assert said.tolist() == known[-1].tokens[:sent]
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert manager.num_cached_block.get(request_id, 0) * PAGE <= request.num_computed_tokens


def test_trace(llm, frames):
    """`d2f_trace` tells when the reference decided each token, whoever shares the batch."""
    for index, (case, _) in enumerate(frames):
        add(llm, f"{index}", case, **({"d2f_trace": 1} if index % 2 else {}))
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            index = int(output.request_id)
            _, known = frames[index]
            if not index % 2:
                with pytest.raises(ValueError, match="d2f_trace"):
                    request_trace(output)
                continue
            if not output.finished:
                continue
            trace = request_trace(output)
            decided_at = {p: frame.forward for frame in known for p in frame.accepted}
            tokens = known[-1].tokens
            assert trace.decided_at == [decided_at[p] for p in range(len(tokens))]
            assert trace.forwards == len(known)
            assert trace.tokens_per_forward == len(tokens) / len(known)
    assert parts(llm)[0].traces == {}


def test_stop_token_that_is_no_end_of_the_window(llm, model):
    """vLLM checks more stop tokens than a window closes for; nothing leaves behind one."""
    from vllm import SamplingParams

    forward, config = load_forward(model)
    case = Case(tuple(random_prompts(1, seed=31)[0]), D2FParams(8, 4, 0.1, 0.95, 0.6), 40)
    *_, last = decode(
        forward,
        case.prompt,
        case.params,
        max_tokens=40,
        mask_id=config.mask_token_id,
        ends=[],
        shift=config.logits_shift,
    )
    stop = last.tokens[20]
    unused = [t for t in range(190) if t not in last.tokens][:MAX_END_TOKENS]
    request = SamplingParams(
        temperature=0,
        max_tokens=40,
        ignore_eos=True,
        detokenize=False,
        stop_token_ids=[*unused, stop],
        extra_args=sampling_params(case).extra_args,
    )
    (output,) = llm.generate({"prompt_token_ids": list(case.prompt)}, request, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == last.tokens[: last.tokens.index(stop) + 1]
    assert output.outputs[0].finish_reason == "stop"
