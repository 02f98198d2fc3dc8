# SPDX-License-Identifier: Apache-2.0
"""The streaming benchmark: block-wise times from a known timeline, and a run."""

import json

from benchmarks.streaming import Timeline, main, summary


def test_a_block_leaves_one_forward_after_it_is_full():
    """Blocks of 4, forwards end at 1, 2, ... 7; another request's forward ends at 8."""
    line = Timeline(4, 0.0, [(1.0, 1), (2.0, 4), (3.0, 6), (5.0, 9), (7.0, 10)])
    steps = [float(at) for at in range(1, 9)]
    assert line.prefix() == [(1.0, 1), (2.0, 3), (3.0, 2), (5.0, 3), (7.0, 1)]
    # Full with forwards 2 and 5, committed by 3 and 6; the rest leaves with the last forward.
    assert line.block(steps) == [(3.0, 4), (6.0, 4), (7.0, 2)]


def test_an_answer_of_one_forward_leaves_at_once_either_way():
    line = Timeline(4, 0.5, [(1.0, 3)])
    assert line.prefix() == line.block([0.4, 1.0, 2.0]) == [(1.0, 3)]


def test_summary():
    figures = summary([0.0, 1.0], [[(1.0, 2), (1.5, 2)], [(1.5, 4)]])
    assert figures == {
        "first_token_ms": 750.0,
        "gap_ms": 500.0,
        "gap_p95_ms": 500.0,
        "pieces": 1.5,
        "tokens_per_piece": 2.67,
    }


def test_quick_run(tmp_path):
    out = tmp_path / "streaming.json"
    assert main(["--quick", "--json", str(out)]) == 0
    ((at_once, ways),) = json.loads(out.read_text())["at_once"].items()
    assert at_once == "2"
    assert ways["prefix"]["first_token_ms"] < ways["block"]["first_token_ms"]
    assert ways["prefix"]["pieces"] > ways["block"]["pieces"]
