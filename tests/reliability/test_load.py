# SPDX-License-Identifier: Apache-2.0
"""Aborts, batch mixes and overload on one engine that is short of everything, in short.

`make stress` has the same at length.
"""

import os

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from stress import aborts, invariance
from stress.aborts import SHORT_OF_EVERYTHING, Storm
from stress.engine_state import STAGES, EngineState, engine, objects
from stress.overload import burst, equal_asks
from stress.traffic import ENGINE_WINDOW, PLAIN, RULED, SETTINGS, Reference, endless, make_asks

from vllm_d2f.d2f import D2FParams
from vllm_d2f.scheduler.trace import Trace
from vllm_d2f.wire import DecodingStats


@pytest.fixture(scope="module")
def llm():
    """Few pages, and a step holds one widest window: preemptions, and windows held back."""
    from vllm_d2f import register

    register()
    with engine(**SHORT_OF_EVERYTHING, disable_log_stats=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(llm):
    return Reference(llm.llm_engine.vllm_config, window=ENGINE_WINDOW)


@pytest.fixture(scope="module")
def asks(reference):
    wide = D2FParams(32, 4, 0.0, 0.95, 0.99)  # opens a block with every forward
    asks = [endless(range(5 + i, 25 + i), wide, 128) for i in range(10)]
    return reference.answers(make_asks(50, 3, 2 * PLAIN + RULED, SETTINGS) + asks)


def test_aborts_leave_nothing_and_disturb_nobody(llm, asks):
    tally = Storm(llm, asks, seed=1).run(250, drain_every=100)
    assert tally.wrong == []
    assert tally.leaks == []
    assert tally.drains >= 2
    assert tally.equal > 50
    assert tally.successors > 10, "hardly a request took the slot of an aborted one"
    hit = {stage for stage, count in tally.aborted.items() if count}
    assert hit >= {"waiting", "streaming", "about to commit", "finished"}
    assert tally.mid_step > 10


def test_aborts_pass_only_if_every_stage_was_hit():
    run = {"by_stage": dict.fromkeys(STAGES, 1), "leaks": [], "completed_wrong": 0}
    assert aborts.failures({"engines": {"a": run}}) == []
    missed = run | {"by_stage": run["by_stage"] | {"preempted": 0}}
    assert aborts.failures({"engines": {"a": missed}}) == ["no abort at stage 'preempted'"]
    assert aborts.failures({"engines": {"a": missed, "b": run}}) == []
    leaky = run | {"leaks": [{"pages": 1}]}
    assert aborts.failures({"engines": {"a": run, "b": leaky}}) == ["leaks"]
    http = {"left": {"running": 1.0}, "log_errors": [], "traffic": {"wrong": 0}}
    assert aborts.failures({"engines": {"a": run}, "http": http}) == ["left over after HTTP"]


def test_the_counting_of_leaks_sees_what_is_there(llm):
    """An unfinished request is no leak, but it is seen wherever one would be."""
    state = EngineState(llm)
    assert state.leaks() == {}
    state.add("x", endless((5, 6, 7), D2FParams(16, 4), 100, logprobs=3))
    assert state.stage("x") == "waiting"
    llm.llm_engine.step()
    seen = state.leaks()
    assert {"pages", "slots", "requests", "running", "streams", "slots of windows"} <= seen.keys()
    assert {"request samplers", "outputs", "LogprobStore objects", "Stream objects"} <= seen.keys()
    state.abort(["x"], mid_step=True)
    state.drain()
    assert state.leaks() == {}
    assert objects() == {}


def test_answers_do_not_depend_on_the_batch(llm, asks):
    """Among others that come, go and are aborted; and in another order."""
    some = [ask for ask in asks if ask.kind in ("greedy", "endless")]
    state = EngineState(llm)
    for way in ("crowd", "shuffled"):
        got = invariance.answers(llm, some, way, seed=2)
        result = invariance.compare(some, got, got)
        assert result["wrong"] == 0, result["differences"]
    assert state.held_back > 0
    assert state.scheduler.num_preempted > 0
    assert state.prefix_hits > 0


def test_compare_tells_what_differs(asks):
    answers = [ask.known[0] for ask in asks[:3]]
    other = [answers[1], *answers[1:]]
    result = invariance.compare(asks[:3], answers, other)
    assert result["as_alone"] == result["as_the_reference"] == 2
    assert result["wrong"] == 1 - answers[0].tie


def test_ways_pass_only_if_each_did_what_it_is_for():
    way = {"wrong": 0, "leaks": {}, "windows_held_back": 1, "pages_found": 1, "preemptions": 1}
    ways = dict.fromkeys((*invariance.MUST_HAPPEN, "alone"), way) | {"reference": {}}
    assert invariance.failures(ways) == []
    assert invariance.failures(ways | {"alone": way | {"wrong": 1}}) == ["alone: wrong answers"]
    assert invariance.failures(ways | {"again": way | {"pages_found": 0}}) == [
        "again: no pages_found"
    ]


def test_order_under_overload(llm, reference):
    """First forwards in the order of arrival; first tokens too, where all ask the same."""
    asks = reference.answers(equal_asks(30, seed=4))
    for these in (asks, asks[:1] * 30):
        level = burst(llm, these)
        assert (level["wrong"], level["out_of_order"], level["leaks"]) == (0, 0, {})
        assert level["preemptions"] > 0


def test_no_block_is_open_after_an_abort(llm):
    """The gauge on /metrics is told, though nothing is denoised any more."""
    state = EngineState(llm)
    told, make_stats = [], state.scheduler.make_stats

    def watched(*args, **kwargs):
        stats = make_stats(*args, **kwargs)
        if stats is not None and stats.spec_decoding_stats is not None:
            told.append(DecodingStats.from_vllm(stats.spec_decoding_stats).open_blocks)
        return stats

    state.scheduler.make_stats = watched
    try:
        state.add("x", endless((5, 6, 7), D2FParams(16, 4), 200))
        llm.llm_engine.step()
        assert told[-1] > 0
        state.abort(["x"])
        state.drain()
        assert told[-1] == 0
    finally:
        del state.scheduler.make_stats


def test_trace_of_a_request_that_ends_before_its_first_forward():
    assert Trace().report(0) == {"forwards": 0, "tokens_per_forward": 0.0, "decided_at": []}
