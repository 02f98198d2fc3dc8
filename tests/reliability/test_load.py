# SPDX-License-Identifier: Apache-2.0
"""Aborts, batch mixes and overload on one engine that is short of everything, in short.

`benchmarks/reliability` has the same at length.
"""

import os

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from benchmarks.parity import Case, shut_down, start_engine
from benchmarks.reliability import invariance
from benchmarks.reliability.aborts import Storm
from benchmarks.reliability.asks import WINDOW, Ask, known_answers, make_asks
from benchmarks.reliability.inside import Inside, objects
from benchmarks.reliability.overload import burst, equal_asks
from vllm_d2f.d2f import D2FParams
from vllm_d2f.scheduler.trace import Trace
from vllm_d2f.wire import DecodingStats

MAX_LEN = 320


@pytest.fixture(scope="module")
def llm():
    """Few pages, and a step holds one widest window: preemptions, and windows held back."""
    from vllm_d2f import register

    register()
    llm = start_engine(
        "d2f-tiny",
        window=WINDOW,
        max_model_len=MAX_LEN,
        max_num_seqs=24,
        num_gpu_blocks_override=40,
        max_num_batched_tokens=MAX_LEN,
        enable_prefix_caching=True,
        disable_log_stats=False,
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )
    yield llm
    shut_down(llm)


@pytest.fixture(scope="module")
def asks():
    wide = D2FParams(32, 4, 0.0, 0.95, 0.99)  # opens a block with every forward
    cases = [Case(tuple(range(5 + i, 25 + i)), wide, 128) for i in range(10)]
    return make_asks(50, 3, MAX_LEN, ruled=0.5) + [Ask(case, "endless") for case in cases]


@pytest.fixture(scope="module")
def known(llm, asks):
    return known_answers(asks, llm.llm_engine.vllm_config)


def test_aborts_leave_nothing_and_disturb_nobody(llm, asks, known):
    tally = Storm(llm, asks, known, seed=1).run(250, drain_every=100)
    assert tally.wrong == []
    assert tally.leaks == []
    assert tally.drains >= 2
    assert tally.equal > 50
    assert tally.successors > 10, "hardly a request took the slot of an aborted one"
    hit = {stage for stage, count in tally.aborted.items() if count}
    assert hit >= {"waiting", "streaming", "about to commit", "finished"}
    assert tally.mid_step > 10


def test_the_counting_of_leaks_sees_what_is_there(llm):
    """An unfinished request is no leak, but it is seen wherever one would be."""
    inside = Inside(llm)
    assert inside.leaks() == {}
    ask = Ask(Case((5, 6, 7), D2FParams(16, 4), 100), "logprobs")
    params = ask.sampling_params()
    params.ignore_eos = True
    llm.llm_engine.add_request("x", {"prompt_token_ids": [5, 6, 7]}, params)
    assert inside.stage("x") == "waiting"
    llm.llm_engine.step()
    seen = inside.leaks()
    assert {"pages", "slots", "requests", "running", "streams", "slots of windows"} <= seen.keys()
    assert {"request samplers", "outputs", "LogprobStore objects", "Stream objects"} <= seen.keys()
    inside.abort(["x"], mid_step=True)
    inside.drain(lambda output: None)
    assert inside.leaks() == {}
    assert objects() == {}


def test_answers_do_not_depend_on_the_batch(llm, asks, known):
    """Among others that come, go and are aborted; and in another order."""
    greedy = [i for i, ask in enumerate(asks) if ask.kind in ("greedy", "endless")]
    some, expected = [asks[i] for i in greedy], [known[i] for i in greedy]
    inside = Inside(llm)
    for way in ("crowd", "shuffled"):
        got = invariance.answers(llm, some, way, seed=2)
        result = invariance.compare(some, expected, got, got)
        assert result["wrong"] == 0, result["differences"]
    assert inside.held_back > 0
    assert inside.scheduler.num_preempted > 0
    assert inside.prefix_hits > 0


def test_compare_tells_what_differs(asks, known):
    answers = [k.answer for k in known[:3]]
    other = [answers[1], *answers[1:]]
    result = invariance.compare(asks[:3], known[:3], answers, other)
    assert result["as_alone"] == result["as_the_reference"] == 2
    assert result["wrong"] == 1 - known[0].tie


def test_order_under_overload(llm):
    """First forwards in the order of arrival; first tokens too, where all ask the same."""
    asks = equal_asks(30, seed=4)
    known = known_answers(asks, llm.llm_engine.vllm_config)
    for these, expected in ((asks, known), (asks[:1] * 30, known[:1] * 30)):
        level = burst(llm, these, expected)
        assert (level.wrong, level.out_of_order, level.leaks) == (0, 0, {})
        assert level.preemptions > 0


def test_no_block_is_open_after_an_abort(llm):
    """The gauge on /metrics is told, though nothing is denoised any more."""
    inside = Inside(llm)
    told, make_stats = [], inside.scheduler.make_stats

    def watched(*args, **kwargs):
        stats = make_stats(*args, **kwargs)
        if stats is not None and stats.spec_decoding_stats is not None:
            told.append(DecodingStats.from_vllm(stats.spec_decoding_stats).open_blocks)
        return stats

    inside.scheduler.make_stats = watched
    try:
        ask = Ask(Case((5, 6, 7), D2FParams(16, 4), 200), "endless")
        llm.llm_engine.add_request("x", {"prompt_token_ids": [5, 6, 7]}, ask.sampling_params())
        llm.llm_engine.step()
        assert told[-1] > 0
        inside.abort(["x"])
        inside.drain(lambda output: None)
        assert told[-1] == 0
    finally:
        del inside.scheduler.make_stats


def test_trace_of_a_request_that_ends_before_its_first_forward():
    assert Trace().report(0) == {"forwards": 0, "tokens_per_forward": 0.0, "decided_at": []}
