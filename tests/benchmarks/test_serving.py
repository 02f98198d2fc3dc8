# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark: counters read right, and `vllm bench serve` on a real server."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import serving
from benchmarks.harness.server import d2f_figures, parse_counters, parse_simulated
from benchmarks.harness.workload import Item

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
    assert point["most_at_once"] is None


def test_runs_at_one_rate_are_combined():
    def run(speed, ms, failed=0):
        latency = {"p50": ms, "p99": 2 * ms}
        return {
            **{"completed": 8 - failed, "failed": failed, "duration_s": 1.0, "most_at_once": 3},
            **{"requests_per_s": speed, "tokens_per_s": 10 * speed},
            **{"score": {"exact": 1.0, "final": 1.0}},
            **dict.fromkeys(serving.LATENCIES.values(), latency),
        }

    point = serving.combine([run(1.0, 50.0), run(3.0, 10.0), run(2.0, 20.0, failed=1)])
    assert (point["runs"], point["completed"], point["failed"]) == (3, 23, 1)
    assert (point["requests_per_s"], point["request_ms"]) == (2.0, {"p50": 20.0, "p99": 40.0})
    assert point["spread"]["tokens_per_s"] == [10.0, 30.0]
    assert point["spread"]["request_ms_p50"] == [10.0, 50.0]


def test_a_server_that_makes_acceptance_up_is_labelled():
    line = 'vllm:d2f_simulated_tokens_per_forward{engine="0",model_name="m"} 2.9\n'
    assert parse_simulated("# HELP " + line + line) == 2.9
    assert parse_simulated(METRICS) is None


@pytest.mark.parametrize("wanted", [None, 2.9])
def test_metrics_say_whether_acceptance_is_made_up(wanted):
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from vllm_d2f.metrics import D2FStatLogger
    from vllm_d2f.settings import settings_from_dict

    settings = settings_from_dict({"block_size": 16, "simulate_tokens_per_forward": wanted})
    hf_config = SimpleNamespace(d2f=settings.as_dict(), family=None)
    model = SimpleNamespace(
        architectures=["DreamModel"], hf_config=hf_config, served_model_name="m"
    )
    unregister_vllm_metrics()
    try:
        D2FStatLogger(SimpleNamespace(model_config=model), [0]).log_engine_initialized()
        assert parse_simulated(generate_latest().decode()) == wanted
    finally:
        unregister_vllm_metrics()


def test_engine_arguments_are_one_word():
    args = serving.parse(["--engine-args=--load-format dummy --additional-config '{\"a\": 1}'"])
    assert args.engine_args == ["--load-format", "dummy", "--additional-config", '{"a": 1}']
    assert serving.engine_options(args)[-4:] == args.engine_args


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
    assert 0 < point["first_token_ms"]["p50"] <= point["request_ms"]["p50"]
    assert point["request_ms"]["p50"] <= point["request_ms"]["p99"]
    assert (tmp_path / "serving.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_broken_model_scores_low(tmp_path, broken_model):
    report = run(tmp_path / "serving.json", "--models", str(broken_model))
    assert [score["exact"] for score in report["scores"].values()] == [0]


@pytest.mark.slow
def test_made_up_acceptance_is_labelled(tmp_path):
    section = {"d2f": {"block_size": 16, "max_blocks": 4, "simulate_tokens_per_forward": 2.9}}
    options = f"--load-format dummy --additional-config '{json.dumps(section)}'"
    report = run(tmp_path / "serving.json", f"--engine-args={options}")
    assert report["models"]["d2f-tiny"]["simulated_tokens_per_forward"] == 2.9
    assert "SIMULATED ACCEPTANCE" in (tmp_path / "serving.md").read_text()
    assert report["scores"]["d2f-tiny"]["exact"] == 0


# How text leaves.


def test_a_block_leaves_one_forward_after_it_is_full():
    """Blocks of 4, forwards end at 1, 2, ... 7; another request's forward ends at 8."""
    line = serving.Timeline(4, 0.0, [(1.0, 1), (2.0, 4), (3.0, 6), (5.0, 9), (7.0, 10)])
    steps = [float(at) for at in range(1, 9)]
    assert line.prefix() == [(1.0, 1), (2.0, 3), (3.0, 2), (5.0, 3), (7.0, 1)]
    # Full with forwards 2 and 5, committed by 3 and 6; the rest leaves with the last forward.
    assert line.block(steps) == [(3.0, 4), (6.0, 4), (7.0, 2)]


def test_an_answer_of_one_forward_leaves_at_once_either_way():
    line = serving.Timeline(4, 0.5, [(1.0, 3)])
    assert line.prefix() == line.block([0.4, 1.0, 2.0]) == [(1.0, 3)]


def test_summary_of_pieces():
    figures = serving.summary([0.0, 1.0], [[(1.0, 2), (1.5, 2)], [(1.5, 4)]])
    assert figures == {
        "first_token_ms": 750.0,
        "gap_ms": 500.0,
        "gap_p95_ms": 500.0,
        "pieces": 1.5,
        "tokens_per_piece": 2.67,
    }


def test_streaming_quick(tmp_path):
    out = tmp_path / "streaming.json"
    assert serving.main(["--streaming", "--quick", "--json", str(out)]) == 0
    ((at_once, ways),) = json.loads(out.read_text())["at_once"].items()
    assert at_once == "2"
    assert ways["prefix"]["first_token_ms"] < ways["block"]["first_token_ms"]
    assert ways["prefix"]["pieces"] > ways["block"]["pieces"]
