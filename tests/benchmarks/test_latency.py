# SPDX-License-Identifier: Apache-2.0
"""The step cost's fit, the predictions that follow, and the benchmark as a whole."""

import json
import random
from dataclasses import asdict

import pytest

from benchmarks import latency
from benchmarks.harness.cost import (
    Cost,
    Trace,
    crossing,
    falls_below_1,
    fit,
    predict_batch,
    predict_steady,
    step_floor_ms,
)
from benchmarks.harness.engine import StepCost


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
    cost = Cost.from_dict({"points": [[1, 8.0], [256, 8.0], [1024, 32.0]]})
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
    """Return a decoder's report by its measured speeds, predicted exactly."""
    return {
        "cost": asdict(Cost(10.0, 0.0)),
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
    about = {"command": "c", "hardware": {"cpu": "x", "threads": 1}}
    report = latency.build({"d2f": checked(d2f), "ar": checked(ar)}, "wall") | about
    first = report["checked_ratio"][0]
    assert first["measured"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    found = report["checked_crossing"]
    assert (found["predicted"], found["measured"]) == (where, where)
    assert found["largest_batch"] == 64
    text = "\n".join(latency.markdown(report))
    assert f"AR overtakes D2F {f'at {where}' if where else 'nowhere up to 64'}, pred" in text


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert latency.main(["--d2f", str(tmp_path)]) == 2
    assert "pass --d2f" in capsys.readouterr().err


@pytest.mark.slow
def test_quick(tmp_path):
    out = tmp_path / "latency_model.json"
    assert latency.main(["--quick", "--json", str(out)]) == 0
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
    assert report["checked_crossing"].keys() >= {"predicted", "measured", "largest_batch"}
    assert report["simulated_tokens_per_forward"] is None
    assert str(tmp_path) not in out.read_text()


# From what `benchmarks.steps` measured.

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATES = {"copy_gb_per_s": 4300.0, "matmul_gflop_per_s": 790000.0}
ANSWER, PROMPT = 128, 512


def step_ms(tokens, context, new=0):
    """Return a machine that reads weights for 4 ms, and multiplies for 20 us a token beyond 256."""
    return 4.0 + 0.02 * max(0, tokens - 256) + 1e-5 * context + 0.01 * new


def steps_points(part, blocks, window):
    points = {}
    for context in (512, 2048):
        for count in blocks:
            for size in SIZES:
                tokens, cached = size * count * window, size * context
                ms = step_ms(tokens, cached)
                prompt_tokens = min(size * context, 32768)
                entering = [size, size, prompt_tokens, 0, step_ms(prompt_tokens, 0, size)]
                points[f"{part}/steps/{context}/{count}/{size}"] = {
                    "tokens": tokens,
                    "context_tokens": cached,
                    "ms": ms,
                    "ms_min": ms,
                    "measured": 8,
                    "steps": [[size, 0, tokens, cached, ms]] * 3,
                    "entering": [entering],
                }
    return points


def speed_points(part, rate, window):
    """Return a batch that is run step by step on the same machine."""
    points = {}
    for size in SIZES:
        forwards = round(ANSWER / rate)
        tokens = size * PROMPT + (size * window if window > 1 else 0)
        spread = -(-tokens // 32768)
        ms = step_ms(tokens, 0, size) + (spread - 1) * step_ms(0, 0)
        for step in range(1, forwards):
            ms += step_ms(size * window, size * (PROMPT + step * rate))
        speed = 1e3 * size * ANSWER / ms
        points[f"{part}/speed/{rate:g}/{size}"] = {
            "tokens": size * ANSWER,
            "seconds": ms / 1e3,
            "tokens_per_s": speed,
            "steps": forwards,
            "first_token_ms": 10.0,
            "last_token_ms": ms,
            "peak_mib": 20000.0,
            "prompt_tokens": PROMPT,
            "answer_tokens": ANSWER,
            **({"tokens_per_forward": rate, "window_tokens": window} if window > 1 else {}),
        }
    return points


def made_up():
    return {
        **steps_points("dream", (4, 1, 2, 8), 32),
        **steps_points("qwen", (1,), 1),
        **speed_points("dream", 2.9, 128),
        **speed_points("qwen", 1.0, 1),
    }


def test_the_cost_model_is_found_again(tmp_path, capsys):
    file, out = tmp_path / "steps.json", tmp_path / "latency.json"
    file.write_text(json.dumps({"points": made_up()}))
    assert latency.main(["--steps", str(file), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    cost = Cost.from_dict(report["decoders"]["d2f"]["cost"])
    for tokens, context in ((128, 512), (2048, 8192), (16384, 65536)):
        assert cost.ms(tokens, context) == pytest.approx(step_ms(tokens, context), rel=0.03)
    assert cost.c_ms_per_context_token == pytest.approx(1e-5, rel=0.3)
    for kind in ("d2f", "ar"):
        checks = report["decoders"][kind]["checks"]
        assert [c["batch_size"] for c in checks] == list(SIZES)
        assert all(abs(c["error"]) < 0.1 for c in checks)
    found = report["checked_crossing"]
    assert found["measured_between"] == pytest.approx(found["predicted_between"], rel=0.1)
    assert 2 < found["measured_between"] < 64
    assert report["decoders"]["d2f"]["trace"]["window_tokens"] == 128
    assert report["predicted_speedup"]["1"] == pytest.approx(2.9, rel=0.1)
    assert report["predicted_speedup"]["1024"] < 1
    assert 1 < report["ar_overtakes_at_batch"] < 100
    printed = capsys.readouterr().out
    assert "SIMULATED ACCEPTANCE**: 2.9" in printed and "AR overtakes D2F at" in printed
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert (tmp_path / "latency_forward_cost.png").stat().st_size > 10_000


def test_crossing_lies_between_the_sizes_around_it():
    assert falls_below_1({1: 2.0, 2: 2.0, 4: 0.5}) == pytest.approx(8**0.5, rel=1e-3)
    assert falls_below_1({1: 1.2, 2: 1.1}) is None
    assert falls_below_1({1: 0.5, 2: 0.4}) is None


def test_without_enough_points_it_says_what_to_run(tmp_path, capsys):
    file = tmp_path / "steps.json"
    few = {k: v for k, v in made_up().items() if not k.startswith("qwen/")}
    file.write_text(json.dumps({"points": few}))
    assert latency.main(["--steps", str(file)]) == 2
    assert "--shapes qwen" in capsys.readouterr().err
    assert latency.main(["--steps", str(tmp_path / "nothing.json")]) == 2


def test_figures_stand_beside_their_floor():
    rates = {"copy_gb_per_s": 4300.0, "matmul_gflop_per_s": 790000.0}
    # 14.14 GB of weights and 512 cached positions at 4300 GB/s.
    floor = (14.140571648e9 + 57344 * 512) / 4300e9 * 1e3
    assert step_floor_ms("dream", 128, 512, rates) == pytest.approx(floor)
    # What multiplies is held against the matrix speed.
    by_flops = 14140571648 * 65536 / 790e12 * 1e3
    assert step_floor_ms("dream", 65536, 512 * 256, rates) == pytest.approx(by_flops)
