# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules and lookahead branches: what beats what, and what is refused."""

from types import SimpleNamespace

import pytest

from benchmarks import acceptance, lookahead
from benchmarks.harness.engine import Answer, Batch
from benchmarks.harness.record import UsageError
from benchmarks.harness.workload import Item
from benchmarks.tasks.jobs import JOBS
from vllm_d2f.d2f import D2FParams

ABOUT = {
    "command": "c",
    "hardware": {"cpu": "x", "threads": 1},
    **{"model": "m", "data": "d", "job": "exact", "max_tokens": 64, "dtype": "float32"},
}


def answers(right, forwards, prompts=200):
    """Ten tokens each, in `forwards` forwards."""
    return [[float(i < right), 1.0, 10, forwards] for i in range(prompts)]


def report_of(*others):
    points = [("threshold", 0.9, answers(190, 5)), ("threshold", 0.5, answers(150, 2)), *others]
    return ABOUT | acceptance.build(JOBS["exact"], points, seed=0)


def test_a_rule_beats_the_line_through_the_points_of_threshold():
    report = report_of(("frechet", 0.5, answers(170, 2)), ("factor", 0.5, answers(170, 4)))
    better, worse = report["rows"][2:]
    # Half of the way between 2 and 5 tokens per forward.
    assert better["threshold_at_score"] == worse["threshold_at_score"] == pytest.approx(3.5)
    assert better["gain"] == pytest.approx(5 / 3.5 - 1, abs=1e-3) and better["beats_threshold"]
    assert worse["gain"] < 0 and not worse["beats_threshold"]
    text = "\n".join(acceptance.markdown(report))
    assert "**`frechet`** takes more tokens" in text and "| factor | 0.5 | 2.5 |" in text


def test_on_the_line_and_outside_of_it_nothing_is_gained():
    report = report_of(("factor", 0.5, answers(190, 5)), ("entropy", 9, answers(20, 1)))
    assert not any(row.get("beats_threshold") for row in report["rows"])
    assert "gain" not in report["rows"][3]
    assert "No rule beats" in acceptance.verdict(report)


def test_errors_count_as_what_is_right():
    """So that more is better for every job."""
    said = Answer(0, False, False, 9, 9, 3, 9, 5, 1.0, 1.0, "the cat sit on the mat")
    engine = SimpleNamespace(
        sampling=SimpleNamespace(max_tokens=64),
        measure=lambda items, batch: [Batch(1.0, 1.0, 3, (said,), 1.0)],
    )
    items = [Item("q", 0.0, "The cat sat on the mat.")]
    one = acceptance.ask(engine, JOBS["restore"], D2FParams(), items, 1)
    assert one == [[5, 6, 9, 3]]
    report = acceptance.build(JOBS["restore"], [("threshold", 0.9, one)], seed=0)
    assert report["score"] == "1 - word_error_rate"
    assert report["rows"][0]["score"] == pytest.approx(5 / 6, abs=1e-3)


@pytest.mark.parametrize("text", ["bold=0.5", "entropy=21", "factor=a", "factor"])
def test_thresholds_of_no_rule_are_refused(text):
    assert acceptance.thresholds(["entropy=0.5,2"]) == {"entropy": (0.5, 2.0)}
    with pytest.raises(UsageError, match="--rules"):
        acceptance.thresholds([text])


def test_lookaheads_win_where_they_are_faster_and_as_good():
    def rows(right, forwards, branches):
        return [[*one, branches * forwards, 0] for one in answers(right, forwards)]

    def report(*points):
        return ABOUT | lookahead.build(JOBS["exact"], [(0, 0.0, 0.9, rows(190, 5, 1)), *points])

    worse = report((2, 0.0, 0.9, rows(180, 5, 3)))
    assert worse["rows"][1]["against_d2f"] == pytest.approx(-0.05)
    assert worse["rows"][1]["branches"] == 3
    assert "do not win" in lookahead.verdict(worse)
    assert "do not win" in lookahead.verdict(report((2, 0.1, 0.9, rows(185, 4, 3))))
    other = report((2, 0.1, 0.9, rows(190, 4, 3)))
    assert "win**: 2.50 tokens per forward at a score of 95.0%, in 3.0" in lookahead.verdict(other)
    assert "| 0.9 | 2 | 0.1 | 2.5 | 3 |" in "\n".join(lookahead.markdown(other))
    # A lower threshold alone gives as much.
    for forwards, said in ((4, "do not win"), (5, "win**")):
        lower = (0, 0.0, 0.8, rows(190, forwards, 1))
        assert said in lookahead.verdict(report(lower, (2, 0.1, 0.9, rows(190, 4, 3))))
