# SPDX-License-Identifier: Apache-2.0
"""The record: points once, failures as results, a journal that outlives its process."""

import json

import pytest

from benchmarks.harness import record
from benchmarks.harness.record import ATTEMPTS, FAILED, TIME_IS_UP, Parser, Record, Skip, UsageError


def arguments(path, *more, rows=3):
    parser = Parser("made_up", "Nothing.")
    parser.add_argument("--rows", type=int, default=rows)
    return parser.finish(["--json", str(path), *more], {"rows": 1}, ("rows",))


def make(path, *more, **options):
    return Record(arguments(path, *more, **options), lambda report: ["# Title"], {})


def test_every_kind_of_point_is_settled_and_a_failure_ends_the_process(tmp_path):
    seen = []

    def measure(key):
        seen.append(key)
        if key == "b":
            raise Skip("not here")
        if key == "c":
            raise RuntimeError("CUDA error: made up")
        return {"ms": 1.0}

    def experiment(run):
        for key in "abcd":
            run.point(key, lambda k=key: measure(k), may_fail=True)
        run.write(run.report(points=run.points))

    args = arguments(tmp_path / "s.json")
    assert record.main(experiment, args, lambda report: ["# Title"], {}) == FAILED
    assert seen == ["a", "b", "c"]
    assert json.loads((tmp_path / "s.json").read_text())["left_for_a_later_run"]
    assert record.main(experiment, args, lambda report: ["# Title"], {}) == 0
    assert seen == ["a", "b", "c", "d"]
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["points"] == {"a": {"ms": 1.0}, "d": {"ms": 1.0}}
    assert report["skipped"] == {"b": "not here"} and "made up" in report["failed"]["c"]
    assert "left_for_a_later_run" not in report and not (tmp_path / "s.jsonl").exists()
    assert record.misses(report)[0] == "- `b` skipped: not here"


def test_a_stopped_run_goes_on(tmp_path):
    run = make(tmp_path / "s.json")
    assert run.point("a", lambda: (1, 2)) == [1, 2]
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write('{"key": "b", "val')  # killed while it wrote
    again = make(tmp_path / "s.json")
    assert again.point("a", lambda: pytest.fail("measured twice")) == [1, 2]
    assert again.point("b", lambda: 3) == 3
    assert make(tmp_path / "s.json").settled("b")
    fresh = make(tmp_path / "s.json", "--restart")
    assert not fresh.settled("a") and not fresh.settled("b")


def test_a_failure_that_may_not_be_is_no_result(tmp_path):
    run = make(tmp_path / "s.json")
    with pytest.raises(ZeroDivisionError):
        run.point("a", lambda: 1 / 0)
    assert not make(tmp_path / "s.json").settled("a")


def test_a_point_that_ends_its_process_is_given_up(tmp_path):
    def end():
        raise KeyboardInterrupt

    for _ in range(ATTEMPTS):
        run = make(tmp_path / "s.json")
        assert not run.settled("a")
        with pytest.raises(KeyboardInterrupt):
            run.point("a", end, may_fail=True)
    run = make(tmp_path / "s.json")
    assert run.settled("a") and "ended 2 times" in run.failed["a"]


def test_no_point_begins_after_the_deadline(tmp_path):
    def experiment(run):
        run.stop()
        assert run.point("a", lambda: 1) is None
        run.need_all()

    args = arguments(tmp_path / "s.json")
    assert record.main(experiment, args, lambda report: [], {}) == TIME_IS_UP
    assert not (tmp_path / "s.json").exists()


def test_points_of_other_options_or_weights_are_not_mixed(tmp_path):
    make(tmp_path / "s.json").point("a", lambda: 1)
    with pytest.raises(UsageError, match="rows differ.*--restart"):
        make(tmp_path / "s.json", "--rows", "4").settled("a")
    make(tmp_path / "t.json").identify(model="m", weights="1")
    with pytest.raises(UsageError, match=r"\(weights differ\).*--restart"):
        make(tmp_path / "t.json").identify(model="m", weights="2")


def test_quick_changes_what_was_not_chosen(tmp_path, capsys):
    assert arguments(tmp_path / "s.json", "--quick").rows == 1
    assert arguments(tmp_path / "s.json", "--quick", "--rows", "5").rows == 5
    with pytest.raises(SystemExit, match="2"):
        arguments(tmp_path / "s.json", "--rows", "0")
    assert "--rows must be at least 1" in capsys.readouterr().err


def test_bars():
    rows = [("a", 1.0, "at most", 2), ("b", 1.0, "at least", 2), ("c", None, "at most", 2)]
    text = record.bars(rows)
    assert text[2:5] == [
        "| a: at most 2 | 1 | met |",
        "| b: at least 2 | 1 | missed |",
        "| c: at most 2 |  | not measured |",
    ]
