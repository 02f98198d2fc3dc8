# SPDX-License-Identifier: Apache-2.0
"""The report and the cost model, on made-up results with known answers."""

import copy
import json

import pytest

from benchmarks import latency_model
from benchmarks.gpu import fit, report
from benchmarks.gpu.stage import STAGES
from benchmarks.gpu.store import Mismatch, Store

ABOUT = {
    "device": "Made-up GPU",
    "versions": {"torch": "2.11.0", "vllm": "0.32.0"},
    "cuda": "13.0",
    "quick": False,
    "rehearse": False,
}
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATES = {"copy_gb_per_s": 4300.0, "matmul_gflop_per_s": 790000.0}
ANSWER, PROMPT = 128, 512


def step_ms(tokens, context, new=0):
    """A machine that reads weights for 4 ms, and multiplies for 20 us a token beyond 256."""
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
                    "host_ms": 0.5,
                    "measured": 8,
                    "steps": [[size, 0, tokens, cached, ms]] * 3,
                    "entering": [entering],
                }
    return points


def speed_points(part, rate, window):
    """A batch that is run step by step on the same machine."""
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
    steps = {
        **steps_points("dream", (4, 1, 2, 8), 32),
        **steps_points("qwen", (1,), 1),
        **speed_points("dream", 2.9, 128),
        **speed_points("qwen", 1.0, 1),
        "dream/memory": {"requests": 256, "free_mib": 1000},
        "dream/start": {
            "attention": "BlockCausalImpl",
            "cudagraph_mode": "PIECEWISE",
            "async_scheduling": False,
            "cache_tokens": 10**6,
            "seconds": 60.0,
        },
    }
    variants = {
        "virtual": {"ms": 0.011, "times_floor": 1.1},
        "flashinfer_cascade": {"ms": 0.010, "times_floor": 1.0},
        "flashinfer_mask": {"failed": "no kernel"},
        "sdpa": {"ms": 0.001, "times_floor": 0.1},
    }
    case = {"floor_ms": 0.01, "bound": "bytes", "variants": variants}
    attention = {"dream/machine": RATES, "dream/512/1/4x32": case, "dream/512/16/4x32": case}
    answers = [[[1, 2, 3], 2], [[4, 5], 1]]
    parity = {
        "wide/reference": {"score": 0.98, "answers_list": answers},
        **{
            f"wide/{backend}/bfloat16/graphs": {
                "answers": 2,
                "equal_answers": 2,
                "equal_tokens": 1.0,
                "score": 0.98,
                "answers_list": answers,
            }
            for backend in ("CUSTOM", "FLASH_ATTN", "TRITON_ATTN")
        },
        "wide/TRITON_ATTN/float32/eager": {
            "answers": 2,
            "equal_answers": 2,
            "equal_tokens": 1.0,
            "score": 0.98,
            "answers_list": answers,
        },
    }
    kernels = {
        "host/machine": RATES,
        "backend/dream/bfloat16/page16": {"max_error": 0.005, "allowed": 0.02},
        "confidence/dream/greedy/32": {
            "ms": 0.004,
            "logits_gb_per_s": 2400.0,
            "relative_error": 1e-6,
        },
        "tests/gpu": {"exit_code": 0, "passed": 3},
    }
    profile = {
        "dream/1": {
            "wall_ms_per_step": 5.0,
            "device_busy_ms": 4.0,
            "device_idle_ms": 0.5,
            "kernels_per_step": 300.0,
            "top_kernels": [{"name": "a|b", "ms_per_step": 1.0, "per_step": 28.0, "share": 0.2}],
            "waits": {"cudaEventSynchronize": {"per_step": 1.0, "ms_per_step": 3.0}},
        }
    }
    figures = {"d2f-tiny": {"exact": 0.99, "final": 0.995}}
    training = {
        "evaluate/all": {"report": {"figures": figures, "training_minutes": {"student": 1.5}}},
        "pack/models": {"file": "models.tar.gz", "bytes": 9_000_000, "models": ["d2f-tiny"]},
    }
    return {
        "steps": steps,
        "attention": attention,
        "parity": parity,
        "kernels": kernels,
        "profile": profile,
        "training": training,
    }


def write(folder, results, **about):
    for name, points in results.items():
        store = Store(folder / f"{name}.json", name, {**ABOUT, **about})
        for key, value in points.items():
            store.points[key] = value
        store.finish("made up")
    return folder


@pytest.fixture(scope="module")
def results():
    return made_up()


def verdicts(text):
    rows = text.split("## Bars")[1].split("\n## ")[0].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows if row.startswith("| ")][1:]
    return {row[0].strip(): row[-1].strip() for row in cells}


def document(folder, results):
    return report.document(report.collect(write(folder, results)), "report")


def test_what_graphs_and_scheduling_ahead_gain_is_shown(tmp_path, results):
    steps = dict(results["steps"])
    for size in (1, 2):
        plain = steps[f"dream/steps/512/4/{size}"]
        steps[f"dream-full/steps/512/4/{size}"] = {**plain, "ms": plain["ms"] * 0.9}
        steps[f"dream-async/steps/512/1/{size}"] = {
            **steps[f"dream/steps/512/1/{size}"],
            "ms": steps[f"dream/steps/512/1/{size}"]["ms"] * 1.25,
        }
    text = document(tmp_path / "variants", {**results, "steps": steps})
    plain = document(tmp_path / "plain", results)
    assert (
        "Step with FULL graphs / without, by requests x blocks: 1 x 4: 0.900, 2 x 4: 0.900." in text
    )
    assert "asynchronous scheduling / without, by requests x blocks: 1 x 1: 1.250" in text
    # The floor is that of the shape, and the bars are those of the plain part.
    (row,) = [line for line in text.splitlines() if line.startswith("| dream-full | 512 | 4 | 1 |")]
    (same,) = [line for line in text.splitlines() if line.startswith("| dream | 512 | 4 | 1 |")]
    assert row.split("|")[6] == same.split("|")[6]
    assert verdicts(text) == verdicts(plain)
    assert "by requests x blocks" not in plain


def test_the_cost_model_is_found_again(results):
    found = fit.analyse(results["steps"], "dream")
    cost = fit.Cost.from_dict(found["d2f"])
    for tokens, context in ((128, 512), (2048, 8192), (16384, 65536)):
        assert cost.ms(tokens, context) == pytest.approx(step_ms(tokens, context), rel=0.03)
    assert cost.c_ms_per_context_token == pytest.approx(1e-5, rel=0.3)
    for kind in ("d2f", "ar"):
        assert [c["batch_size"] for c in found[kind]["checks"]] == list(SIZES)
        assert all(abs(c["error"]) < 0.1 for c in found[kind]["checks"])
    assert found["crossing_measured"] == pytest.approx(found["crossing_predicted"], rel=0.1)
    assert 2 < found["crossing_measured"] < 64


def test_crossing_lies_between_the_sizes_around_it():
    assert fit.crossing([1, 2, 4], [2.0, 2.0, 0.5]) == pytest.approx(8**0.5, rel=1e-3)
    assert fit.crossing([1, 2], [1.2, 1.1]) is None
    assert fit.crossing([1, 2], [0.5, 0.4]) is None


def test_costs_go_into_the_latency_model(tmp_path, results, capsys):
    folder = write(tmp_path / "r", {"steps": results["steps"]})
    costs = tmp_path / "costs.json"
    assert fit.main([str(folder / "steps.json"), "--json", str(costs)]) == 0
    assert "AR overtakes: predicted" in capsys.readouterr().out
    decoders = latency_model.by_hand(str(costs))
    predicted = latency_model.build(decoders, {"clock": "given"})
    assert predicted["predicted_speedup"]["1"] == pytest.approx(2.9, rel=0.1)
    assert predicted["ar_overtakes_at_batch"] is not None
    assert decoders["d2f"]["trace"]["window_tokens"] == 128


def test_without_enough_points_it_says_what_to_run(tmp_path, results, capsys):
    few = {k: v for k, v in results["steps"].items() if not k.startswith("qwen/")}
    folder = write(tmp_path, {"steps": few})
    assert fit.main([str(folder / "steps.json")]) == 2
    assert "steps/qwen" in capsys.readouterr().err
    assert fit.main([str(tmp_path / "nothing.json")]) == 2


def test_bars_are_met(tmp_path, results):
    text = report.document(report.collect(write(tmp_path, results)), "report")
    found = verdicts(text)
    met = [what for what, verdict in found.items() if verdict == "met"]
    assert "dream, 4 blocks of 32, 1 request: step / qwen's: at most 1.25x" in met
    assert "the same step: at most 5.5 ms" in met
    assert "attention / floor, 1 request(s), worst case: at most 1.5x" in met
    assert "dream at 2.9 tokens per forward / qwen, batch 1: at least 2.5x" in met
    assert "dream: prediction of where qwen overtakes is off by: at most 10 %" in met
    assert "dream: 256 requests with windows of 128 fit" in met
    assert "float32 answers equal the reference's" in met
    # At 8 requests with windows of 128 this machine multiplies: 1024 tokens take 5 times as long.
    assert found["dream at 2.9 tokens per forward / qwen, batch 8: at least 2.5x"] == "missed"
    # LLaDA was not measured.
    assert found["llada: 256 requests with windows of 128 fit"] == "not measured"
    assert found["llada, 4 blocks of 32, 1 request: step / llama's: at most 1.25x"] == (
        "not measured"
    )


def test_bars_are_missed(tmp_path, results):
    worse = copy.deepcopy(results)
    worse["steps"]["dream/steps/512/4/1"]["ms"] = 6.0
    for case in ("dream/512/1/4x32", "dream/512/16/4x32"):
        for name in ("virtual", "flashinfer_cascade"):
            worse["attention"][case]["variants"][name]["times_floor"] = 1.6
    worse["parity"]["wide/FLASH_ATTN/bfloat16/graphs"]["answers_list"] = [[[9], 1], [[4, 5], 1]]
    worse["parity"]["wide/FLASH_ATTN/bfloat16/graphs"]["score"] = 0.5
    del worse["steps"]["dream/memory"]
    folder = write(tmp_path, worse)
    store = Store(folder / "steps.json", "steps", {})
    store.fail("dream/memory", "OutOfMemoryError: made up")
    text = report.document(report.collect(folder), "report")
    found = verdicts(text)
    for what in (
        "dream, 4 blocks of 32, 1 request: step / qwen's: at most 1.25x",
        "the same step: at most 5.5 ms",
        "attention / floor, 1 request(s), worst case: at most 1.5x",
        "bfloat16 score - the reference's, worst: at least -0.02",
        "FLASH_ATTN, TRITON_ATTN and CUSTOM give the same tokens (bfloat16)",
        "dream: 256 requests with windows of 128 fit",
    ):
        assert found[what] == "missed", what
    assert "steps dream/memory: failed, OutOfMemoryError: made up" in text
    assert "CUSTOM and FLASH_ATTN: 50.0% of answers equal" in text


def test_figures_stand_beside_their_floor(tmp_path, results):
    text = report.document(report.collect(write(tmp_path, results)), "report")
    assert "# Measured on Made-up GPU" in text and "vllm 0.32.0" in text
    # 14.14 GB of weights and 512 cached positions at 4300 GB/s.
    floor = (14.140571648e9 + 57344 * 512) / 4300e9 * 1e3
    row = next(x for x in text.splitlines() if x.startswith("| dream | 512 | 4 | 1 |"))
    assert f"| {floor:.3f} |" in row and "| 1.2" in row
    # What multiplies is held against the matrix speed.
    point = results["steps"]["dream/steps/512/8/256"]
    by_flops = 14140571648 * 65536 / 790e12 * 1e3
    assert report.step_floor_ms("dream", point, RATES) == pytest.approx(by_flops)
    assert "| virtual | 2 | 1.10 | 0 | 0 |" in text
    # Cascade is 10 % faster than virtual sequences in two cases that matter.
    assert "| flashinfer_cascade | 2 | 1.00 | 2 | 2 |" in text
    assert "`flashinfer_mask`: no kernel" in text
    assert "| a/b | 1.0000 | 28 | 20.0% |" in text
    assert "| d2f-tiny | 99.0% | 99.5% | 1.5 |" in text
    # 32 rows of logits: 0.004 ms at 2400 GB/s are 0.0022 ms at 4300.
    assert "| dream | greedy | 32 | 0.0040 | 0.0022 | 1.79 | 1.0e-06 |" in text
    for line in text.splitlines():
        assert "None" not in line, line


def test_what_was_not_measured_is_said(tmp_path):
    text = report.document(report.collect(write(tmp_path, {"kernels": {}})), "report")
    assert set(verdicts(text).values()) == {"not measured"}
    for stage in STAGES:
        if stage.name != "kernels":
            assert f"- {stage.name}: the whole stage" in text
    assert "- kernels/host: not finished" in text


def test_rehearsals_and_short_runs_say_so(tmp_path, results):
    folder = write(tmp_path, {"kernels": results["kernels"]}, rehearse=True, quick=True)
    text = report.document(report.collect(folder), "report")
    assert "no figure here means anything" in text and "`--quick`" in text


def test_results_of_two_devices_are_not_mixed(tmp_path, results, capsys):
    write(tmp_path, {"kernels": results["kernels"]})
    write(tmp_path, {"profile": results["profile"]}, device="Another")
    with pytest.raises(Mismatch, match="Another, Made-up GPU"):
        report.collect(tmp_path)
    assert report.main([str(tmp_path / "empty")]) == 2
    assert "run.sh" in capsys.readouterr().err


def test_the_command_writes_the_document(tmp_path, results):
    folder = write(tmp_path / "r", results)
    out = tmp_path / "h200.md"
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert out.read_text().startswith("# Measured on Made-up GPU")
    assert str(tmp_path) not in out.read_text()
    json.loads((folder / "steps.json").read_text())
