# SPDX-License-Identifier: Apache-2.0
"""The sweep: its grid, its frontier, going on after a stop, and scores that mean something."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import sweep
from benchmarks.sweep import NAMES, build, markdown, pareto, sign_test, verdict, wilson
from vllm_d2f.d2f import D2FParams

ROOT = Path(__file__).resolve().parents[2]
BASE = D2FParams(16, 4, 0.1, 0.95, 0.9)
ABOUT = {
    "command": "c",
    "hardware": {"cpu": "x", "threads": 1},
    "model": "m",
    "data": "d",
    "problems": 200,
    "batch_size": 1,
    "max_tokens": 64,
}


def measurement(exact, *, tau_conf=0.9, forwards=100, seconds=1.0, repeat=0):
    params = asdict(D2FParams(16, 4, 0.1, 0.95, tau_conf))
    wrong = list(range(200 - exact))
    return {
        **{"params": params, "repeat": repeat, "problems": 200, "exact": exact, "final": exact},
        **{"wrong": wrong, "useful": 500, "forwards": forwards, "seconds": seconds},
        "cpu_seconds": 0.5,
    }


def report_of(measurements):
    return ABOUT | build(asdict(BASE), measurements)


def test_grids_cover_the_papers_ranges():
    full = sweep.full_grid(BASE)
    assert len(full) == len(set(full)) > 1000
    for name, low, high in (
        ("tau_conf", 0.7, 0.99), ("tau_add", 0.05, 0.9), ("tau_act", 0.7, 0.99)
    ):  # fmt: skip
        for grid in (full, sweep.paper_grid(BASE)):
            values = {getattr(point, name) for point in grid}
            assert {low, high} <= values
    assert BASE in sweep.paper_grid(BASE)
    assert len({(p.block_size, p.max_blocks) for p in sweep.paper_grid(BASE)}) >= 9


def test_pareto_points():
    points = [(1, 0.9), (2, 0.8), (2, 0.9), (3, 0.5), (2.5, 0.5), (2, 0.9)]
    assert pareto(points) == [False, False, True, True, False, True]


def test_wilson_interval():
    low, high = wilson(95, 100)
    assert (round(low, 3), round(high, 3)) == (0.888, 0.978)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 10)[0] == 0.0


def test_sign_test_compares_problem_by_problem():
    assert sign_test({1, 2, 3, 4}, set()) == 0.125
    assert sign_test(set(range(12)), {100}) == pytest.approx(2 * (1 + 13) / 2**13)
    assert sign_test({1, 2}, {3, 4}) == sign_test(set(), set()) == 1.0


def test_a_job_that_counts_more_finely_is_ranked_by_its_own_score():
    """The first point has more answers right to the letter, the second more of the slots."""
    letters = measurement(120) | {"counts": [(0.5, 1.0)] * 200}
    slots = measurement(100, tau_conf=0.99) | {"counts": [(0.9, 1.0)] * 200}
    report = report_of([letters, slots]) | {"score_name": "slots"}
    first, second = report["rows"]
    assert (first["score"], second["score"]) == (0.5, 0.9)
    assert second["score_ci95"] == [0.9, 0.9]
    assert (first["pareto_forward"], second["pareto_forward"]) == (False, True)
    assert report["score"]["lowest"] == 0.5 and report["score"]["highest"] == 0.9
    assert "| score |" in "\n".join(markdown(report))
    exact = report_of([measurement(120), measurement(100, tau_conf=0.99)])
    assert [row["pareto_forward"] for row in exact["rows"]] == [True, False]


def test_report_says_whether_the_frontier_is_flat():
    flat = report_of([measurement(199), measurement(200, tau_conf=0.99)])
    assert flat["flat"] and "flat" in verdict(flat)
    steep = report_of([measurement(120), measurement(200, tau_conf=0.99)])
    assert not steep["flat"] and "flat" not in verdict(steep)


def test_report_takes_the_median_of_the_runs_and_marks_the_frontier():
    runs = [measurement(200, seconds=s, repeat=i) for i, s in enumerate((1.0, 2.0, 4.0))]
    report = report_of([*runs, measurement(180, tau_conf=0.7, forwards=50)])
    slow, fast = sorted(report["rows"], key=lambda row: row["tokens_per_forward"])
    assert (slow["tokens_per_s"], slow["tokens_per_s_range"], slow["runs"]) == (250, [125, 500], 3)
    assert (slow["tokens_per_forward"], fast["tokens_per_forward"]) == (5.0, 10.0)
    assert slow["tokens_per_cpu_s"] == 1000
    assert slow["pareto_forward"] and fast["pareto_forward"]
    assert set(NAMES) < set(slow)
    assert "| FS |" in "\n".join(markdown(report))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model", "/no/such/folder"], "--model"),
        (["--model", "ar-tiny"], "no D2F model"),
        (["--data", "/no/such/file"], "--data"),
    ],
)
def test_what_is_missing_is_said(arguments, hint, capsys):
    assert sweep.main([*arguments, "--quick"]) == 2
    assert hint in capsys.readouterr().err


def run(model, path):
    command = [sys.executable, "-m", "benchmarks.sweep", "--quick", "--model", str(model)]
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.slow
def test_quick_and_its_second_run(tmp_path):
    path = tmp_path / "sweep.json"
    report = run("d2f-tiny", path)
    assert {"score", "flat", "base", "units", "versions", "hardware", "rows"} <= report.keys()
    assert len(report["rows"]) == 4 and report["score"]["highest"] >= 0.9
    for row in report["rows"]:
        assert 1 < row["tokens_per_forward"] < 64 and row["tokens_per_s"] > 1
        assert 0 <= row["exact"] <= row["final"] <= 1
    assert path.with_suffix(".png").stat().st_size > 5000
    assert str(tmp_path) not in path.read_text()
    lines = path.with_suffix(".jsonl").read_text()
    # Nothing is left to do: no engine starts, and the result is the same.
    assert run("d2f-tiny", path)["rows"] == report["rows"]
    assert path.with_suffix(".jsonl").read_text() == lines


@pytest.mark.slow
def test_a_broken_model_scores_low(tmp_path, broken_model):
    assert run(broken_model, tmp_path / "sweep.json")["score"]["highest"] <= 0.1
