# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark: counters read right, and `vllm bench serve` on a real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.serving_server import d2f_figures, parse_counters
from benchmarks.workload import Item

ROOT = Path(__file__).resolve().parents[2]
METRICS = """\
# HELP vllm:diffusion_num_committed_tokens_total Number of committed (finalized) tokens.
vllm:diffusion_num_committed_tokens_total{engine="0",model_name="m"} 120.0
vllm:diffusion_num_committed_tokens_total{engine="1",model_name="m"} 80.0
vllm:diffusion_num_committed_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:diffusion_num_denoising_steps_total{engine="0",model_name="m"} 50.0
vllm:diffusion_num_canvas_positions_total{engine="0",model_name="m"} 1.6e+03
vllm:generation_tokens_total{engine="0",model_name="m"} 200.0
"""


def test_counters_are_summed_over_engines():
    found = parse_counters(METRICS)
    assert found == {
        "committed_tokens": 200,
        "denoising_forwards": 50,
        "window_positions": 1600,
        "generated_tokens": 200,
    }


def test_figures_are_differences():
    after = parse_counters(METRICS)
    before = after | {"committed_tokens": 100, "denoising_forwards": 25, "window_positions": 800}
    found = d2f_figures(before, after)
    assert found["tokens_per_forward"] == 4.0 and found["positions_per_token"] == 8.0
    assert found["counters"]["committed_tokens"] == 100


def test_an_ar_server_has_no_d2f_figures():
    assert d2f_figures({"generated_tokens": 1}, {"generated_tokens": 5}) == {
        "counters": {"generated_tokens": 4}
    }


def test_answers_that_were_cut_off_are_wrong():
    items = [Item("q", 5.0, "2+3=5"), Item("q", 5.0, "2+3=5")]
    found = {
        "output_lens": [6, 64],
        "generated_texts": ["2+3=5", "2+3=5"],
        **{name: 2 for name in ("completed", "duration", "request_throughput")},
        "output_throughput": 35.0,
        **{f"p{p}_{n}_ms": 1.0 for p in serving.PERCENTILES for n in serving.LATENCIES},
    }
    point = serving._point(found, items, 64)
    assert point["score"] == {"exact": 0.5, "final": 0.5} and point["failed"] == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--models", "/no/such/folder"], "--models"),
        (["--data", "/no/such/file"], "--data"),
        (["--base-url", "http://127.0.0.1:9", "--models", "d2f-tiny"], "no answer"),
        (["--base-url", "http://127.0.0.1:9"], "one model"),
    ],
)
def test_what_is_missing_is_said(arguments, hint, capsys):
    quick = [] if hint == "one model" else ["--quick"]
    assert serving.main([*arguments, *quick]) == 2
    assert hint in capsys.readouterr().err


def run(path, *arguments):
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--json", str(path)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(path.parent) not in path.read_text()
    return json.loads(path.read_text())


@pytest.mark.slow
def test_quick(tmp_path):
    report = run(tmp_path / "serving.json")
    assert {"scores", "versions", "hardware", "command", "seed", "units"} <= report.keys()
    assert report["scores"]["d2f-tiny"]["final"] >= 0.75
    (point,) = report["models"]["d2f-tiny"]["points"]
    assert (point["completed"], point["failed"]) == (8, 0)
    # Scored twice: as /v1/completions answers, and as the answers that were timed.
    assert point["score"] == report["scores"]["d2f-tiny"]
    assert 1 < point["tokens_per_forward"] < 64
    assert point["counters"]["committed_tokens"] == point["counters"]["generated_tokens"]
    assert 0 < point["first_token_ms"]["p50"] <= point["request_ms"]["p50"] < 60_000
    assert point["request_ms"]["p50"] <= point["request_ms"]["p99"]
    assert (tmp_path / "serving.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_broken_model_scores_low(tmp_path, broken_model):
    report = run(tmp_path / "serving.json", "--models", str(broken_model))
    assert [score["exact"] for score in report["scores"].values()] == [0]
