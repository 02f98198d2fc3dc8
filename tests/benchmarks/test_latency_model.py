# SPDX-License-Identifier: Apache-2.0
"""The step cost's fit, the predictions that follow, and the benchmark as a whole."""

import json
import random

import pytest

from benchmarks import latency_model
from benchmarks.costs import Cost, Trace, crossing, fit, predict_batch, predict_steady
from benchmarks.engine import StepCost

HAND = {
    "d2f": {
        "points": [[1, 8.0], [256, 8.0], [1024, 32.0]],
        "tokens_per_forward": 3.0,
        "window_tokens": 64,
        "answer_tokens": 192,
        "prompt_tokens": 128,
    },
    "ar": {
        "points": [[1, 8.0], [256, 8.0], [1024, 32.0]],
        "tokens_per_forward": 1,
        "window_tokens": 1,
        "answer_tokens": 192,
        "prompt_tokens": 128,
    },
}


def test_fit_finds_the_formula_through_slow_steps():
    rng = random.Random(0)
    steps = []
    for _ in range(400):
        requests, new = rng.randint(1, 32), rng.randint(0, 4)
        tokens, context = requests * rng.randint(1, 64), requests * rng.randint(0, 100)
        ms = 5 + 0.05 * tokens + 0.004 * context + 1.5 * new
        # Every tenth step waits for another process.
        slow = 3 if rng.random() < 0.1 else 1
        steps.append(StepCost(requests, new, tokens, context, ms * slow))
    cost = fit(steps)
    assert cost.a_ms == pytest.approx(5, rel=0.05)
    assert cost.b_ms_per_token == pytest.approx(0.05, rel=0.05)
    assert cost.c_ms_per_context_token == pytest.approx(0.004, rel=0.1)
    assert cost.d_ms_per_request == pytest.approx(1.5, rel=0.1)
    assert cost.relative_error(steps)["median"] < 0.01


def test_fit_has_no_negative_cost():
    steps = [StepCost(1, 0, tokens, 10, 8.0 - 0.001 * tokens) for tokens in range(1, 100)]
    cost = fit(steps)
    assert min(cost.a_ms, cost.b_ms_per_token, cost.c_ms_per_context_token) >= 0


def test_points_are_joined_by_lines():
    cost = Cost.from_dict(HAND["d2f"])
    assert [cost.ms(t, 0) for t in (0, 1, 100, 640, 1024, 1408)] == [8, 8, 8, 20, 32, 44]


def test_steady_speed_of_one_request():
    cost, trace = Cost(10.0, 0.0), Trace(3.0, 64, 30, 10)
    assert predict_steady(cost, trace, 1) == pytest.approx(300)
    assert predict_steady(cost, trace, 4) == pytest.approx(1200)


def test_a_batch_lasts_as_long_as_its_longest_request():
    cost = Cost(10.0, 0.0)
    traces = [Trace(2.0, 8, 4, 5), Trace(2.0, 8, 8, 5)]
    assert predict_batch(cost, traces, 2, 8192) == pytest.approx(1e3 * 12 / 40)
    assert predict_batch(cost, traces, 1, 8192) == pytest.approx(1e3 * 12 / 60)


def test_crossing():
    ar, trace = Cost(10.0, 0.1), Trace(1, 1, 100, 1)
    wide = Trace(3, 64, 100, 1)
    at = crossing(ar, wide, ar, trace)
    assert at is not None and at > 1
    assert predict_steady(ar, wide, at - 1) >= predict_steady(ar, trace, at - 1)
    assert predict_steady(ar, wide, at) < predict_steady(ar, trace, at)
    assert crossing(Cost(10.0, 0.0), wide, Cost(10.0, 0.0), trace) is None


def checked(speeds):
    """A decoder's report by its measured speeds, predicted exactly."""
    return {
        "cost": Cost(10.0, 0.0).as_dict(),
        "trace": Trace(1, 1, 10, 10).as_dict(),
        "checks": [
            {
                "batch_size": size,
                "predicted": speed,
                "measured": speed,
                "measured_runs": [speed, 2 * speed],
                "error": 0.0,
            }
            for size, speed in speeds.items()
        ],
    }


@pytest.mark.parametrize(("last", "where"), [(70.0, 64), (110.0, None)])
def test_the_crossing_is_checked_against_measured_batches(last, where):
    d2f, ar = {1: 30.0, 8: 80.0, 64: last}, {1: 10.0, 8: 40.0, 64: 100.0}
    about = {"clock": "wall", "command": "c", "hardware": {"cpu": "x", "threads": 1}}
    report = latency_model.build({"d2f": checked(d2f), "ar": checked(ar)}, about)
    first = report["checked_ratio"][0]
    assert first["measured"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    assert report["checked_crossing"] == {
        "predicted": where,
        "measured": where,
        "largest_batch": 64,
    }
    text = latency_model.markdown(report)
    assert f"AR overtakes D2F {f'at {where}' if where else 'nowhere up to 64'}, pred" in text


def test_by_hand(tmp_path, capsys):
    given, out = tmp_path / "costs.json", tmp_path / "model.json"
    given.write_text(json.dumps(HAND))
    assert latency_model.main(["--step-ms-json", str(given), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["predicted_speedup"]["1"] == pytest.approx(3, rel=0.01)
    assert 4 < report["ar_overtakes_at_batch"] < 100
    assert report["predicted_speedup"]["1024"] < 1
    assert "AR overtakes D2F at" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("damage", ["window_tokens", "points", "file"])
def test_by_hand_says_what_is_missing(tmp_path, capsys, damage):
    given = tmp_path / "costs.json"
    if damage != "file":
        d2f = {k: v for k, v in HAND["d2f"].items() if k != damage}
        given.write_text(json.dumps(HAND | {"d2f": d2f}))
    assert latency_model.main(["--step-ms-json", str(given)]) == 2
    error = capsys.readouterr().err
    assert "--step-ms-json" in error and "benchmarks/README.md" in error


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert latency_model.main(["--d2f", str(tmp_path)]) == 2
    assert "pass --d2f" in capsys.readouterr().err


@pytest.mark.slow
def test_quick(tmp_path):
    out = tmp_path / "latency_model.json"
    assert latency_model.main(["--quick", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report.keys() >= {"predicted_speedup", "prediction_error", "units", "versions", "seed"}
    for kind in ("d2f", "ar"):
        decoder = report["decoders"][kind]
        assert decoder["score"] >= 0.75
        cost = decoder["cost"]
        assert min(cost[k] for k in cost if k != "points") >= 0 and sum(map(bool, cost.values()))
        assert {c["batch_size"] for c in decoder["checks"]} == {1, 4}
        for c in decoder["checks"]:
            assert c["error"] == pytest.approx(c["predicted"] / c["measured"] - 1, abs=0.01)
            assert len(c["measured_runs"]) == 1
        assert all(s["ms"] > 0 and s["tokens"] >= s["requests"] for s in decoder["steps"])
    assert report["decoders"]["ar"]["trace"]["tokens_per_forward"] == 1
    assert report["decoders"]["d2f"]["trace"]["tokens_per_forward"] > 2
    assert [row["batch_size"] for row in report["checked_ratio"]] == [1, 4]
    assert report["checked_crossing"].keys() == {"predicted", "measured", "largest_batch"}
    assert report["simulated_tokens_per_forward"] is None
    assert str(tmp_path) not in out.read_text()
