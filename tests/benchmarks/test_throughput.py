# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark: its keys, its units, and that a score is a score."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import throughput
from benchmarks.engine import Answer, Batch
from benchmarks.points import paired, paired_per_answer, percentiles, point, spread
from benchmarks.vanilla import Setting, up_to_end
from benchmarks.workload import Item, UsageError, final_number, grade, load_items, resolve_model
from vllm_d2f.names import resolve

TOP = {
    *("speedup_vs_ar_batch1", "score_d2f", "score_ar", "score_vanilla", "score_problems"),
    *("command", "seed", "versions", "hardware", "units", "d2f_vs_ar", "d2f_vs_vanilla", "points"),
}
POINT = {
    *("useful_tokens_per_s", "raw_tokens_per_s", "requests_per_s", "tokens_per_forward"),
    *("computed_per_committed", "time_to_first_token_ms", "time_per_token_ms", "peak_mib"),
    *("score", "exact", "kind", "mode", "batch_size", "runs"),
}


def batch(seconds, useful, item=0, final=True, raw=None, forwards=2):
    answer = Answer(
        item, final, final, useful, raw or useful, forwards, 32, 9, seconds / 2, seconds
    )
    return Batch(seconds, seconds, forwards, (answer,), 100.0)


def broken_copy(folder):
    """d2f-tiny with the rows of its language-model head in another order."""
    shutil.copytree(resolve("d2f-tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    order = torch.randperm(
        len(weights["lm_head.weight"]), generator=torch.Generator().manual_seed(0)
    )
    weights["lm_head.weight"] = weights["lm_head.weight"][order].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_point_has_the_figures_it_names():
    runs = [[batch(2.0, 10), batch(2.0, 30, item=1, final=False)], [batch(1.0, 40)]]
    got = point(runs, has_text=False)
    assert got["useful_tokens_per_s"] == {"median": 25.0, "min": 10.0, "max": 40.0}
    assert got["requests_per_s"] == {"median": 0.75, "min": 0.5, "max": 1.0}
    assert got["tokens_per_forward"] == pytest.approx(80 / 6, rel=1e-3)
    assert got["computed_per_committed"] == pytest.approx(96 / 80, rel=1e-3)
    assert got["time_to_first_token_ms"] == {"p50": 1000.0, "p99": 1000.0}
    assert got["score"] == pytest.approx(2 / 3, rel=1e-3)
    assert got["exact"] is None and got["problems"] == 2


def test_ratios_are_paired_run_by_run():
    fast = [[batch(1.0, 10)], [batch(4.0, 10)]]
    slow = [[batch(2.0, 10)], [batch(8.0, 10)]]
    # The machine was four times slower in the second run; the ratio does not show it.
    assert paired(fast, slow) == spread([2.0, 2.0])


def test_an_early_end_does_not_make_vanilla_look_slower_per_answer():
    d2f = [[batch(1.0, 20, item=0), batch(9.0, 20, item=1)]]
    vanilla = [[batch(10.0, 1, item=0)]]
    got = paired_per_answer(d2f, vanilla)
    assert got["answers"]["median"] == 10.0
    assert got["tokens"]["median"] == 200.0


def test_percentiles_are_nearest_rank():
    assert percentiles(range(1, 101)) == {"p50": 50, "p99": 99}
    assert percentiles([7]) == {"p50": 7, "p99": 7}


@pytest.mark.parametrize(
    ("text", "number"),
    [("34+25=59-18=41", 41), ("#### 1,234", 1234), ("-5", -5), ("is 2.5.", 2.5), ("none", None)],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_grading_needs_the_end_and_the_number():
    item = Item("q", 41, "34+7=41")
    assert grade(item, "34+7=41", True).exact
    assert grade(item, "33+8=41", True).final and not grade(item, "33+8=41", True).exact
    assert not grade(item, "34+7=41", False).final
    assert not grade(item, "34+7=42", True).final


def test_vanilla_settings():
    assert Setting.parse("512:4").steps == 128
    assert Setting.parse("64") == Setting(64, 1)
    for bad in ("x", "8:9", "0:1", "8:0"):
        with pytest.raises(ValueError, match="tokens per step|LENGTH"):
            Setting.parse(bad)
    assert up_to_end([5, 6, 0, 7], [0]) == (True, [5, 6])
    assert up_to_end([5, 6], [0]) == (False, [5, 6])


def test_vanilla_gets_other_prompts_in_every_run():
    items = tuple(Item(str(i), i) for i in range(8))
    plan = throughput.Plan(items, (1,), 3, 8, (Setting(64, 1),), 128)
    assert [plan.asked_vanilla(Setting(64, 1), run)[0] for run in range(5)] == [0, 2, 4, 6, 0]
    assert len(plan.asked_vanilla(Setting(512, 1), 0)[1]) == 1
    assert len(plan.asked_vanilla(Setting(64, 64), 0)[1]) == 8


def test_missing_things_say_what_to_pass(tmp_path, capsys):
    with pytest.raises(UsageError, match="pass --d2f an embedded name"):
        resolve_model("--d2f", "d2f-tyni")
    with pytest.raises(UsageError, match="no config.json there; pass --ar"):
        resolve_model("--ar", str(tmp_path))
    with pytest.raises(UsageError, match='JSONL file with "question"'):
        load_items(1, str(tmp_path / "no.jsonl"), 0)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UsageError, match="line 1.*question"):
        load_items(1, str(tmp_path / "bad.jsonl"), 0)
    (tmp_path / "short.jsonl").write_text('{"question": "x", "answer": "#### 3"}\n')
    assert load_items(1, str(tmp_path / "short.jsonl"), 0) == [Item("x", 3.0)]
    with pytest.raises(UsageError, match="2 are needed"):
        load_items(2, str(tmp_path / "short.jsonl"), 0)
    assert throughput.main(["--data", str(tmp_path / "no.jsonl")]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.slow
def test_quick(tmp_path):
    file = tmp_path / "throughput.json"
    assert throughput.main(["--quick", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report.keys() >= TOP
    assert list(report)[:4] == ["benchmark", "speedup_vs_ar_batch1", "score_d2f", "score_ar"]
    assert report["speedup_vs_ar_batch1"] == report["d2f_vs_ar"][0]["ratio"]["median"] > 1
    assert all(p.keys() >= POINT and p.keys() - report["units"].keys() for p in report["points"])
    assert {(p["kind"], p["batch_size"]) for p in report["points"]} == {
        *(("d2f", 1), ("d2f", 4), ("ar", 1), ("ar", 4), ("vanilla", 1))
    }
    assert all(p["score"] >= 0.75 for p in report["points"] if p["mode"] != "64:4")
    for p in report["points"]:
        speed = p["useful_tokens_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert p["raw_tokens_per_s"]["median"] >= speed["median"]
        assert 10 < p["peak_mib"] < 100_000
        first, per_token = p["time_to_first_token_ms"], p["time_per_token_ms"]
        assert first["p50"] <= first["p99"] and per_token["p50"] <= per_token["p99"]
        # Milliseconds, not seconds: one request's tokens per second from its time per token.
        if p["batch_size"] == 1:
            assert 1e3 / per_token["p50"] == pytest.approx(speed["median"], rel=0.7)
    ar = [p for p in report["points"] if p["kind"] == "ar"]
    assert all(p["tokens_per_forward"] == p["computed_per_committed"] == 1 for p in ar)
    for key in ("vllm-d2f", "torch", "transformers"):
        assert key in report["versions"]
    assert str(tmp_path) not in file.read_text()
    assert "| d2f eager | 1 |" in file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_broken_model_scores_low(tmp_path):
    file = tmp_path / "broken.json"
    broken = str(broken_copy(tmp_path / "d2f-broken"))
    options = ["--quick", "--ar", "", "--teacher", "", "--json", str(file)]
    assert throughput.main(["--d2f", broken, *options]) == 0
    report = json.loads(file.read_text())
    assert report["score_d2f"] == report["exact_d2f"] == 0
    assert report["speedup_vs_ar_batch1"] is None


@pytest.mark.slow
def test_vanilla_is_the_teachers_own_decoding(tmp_path):
    """One token per step on a canvas it was trained for answers right; a broken model does not."""
    from benchmarks.vanilla import Vanilla

    items = load_items(4, None, 0)
    good = Vanilla(resolve("dream-tiny")).measure(items, Setting(64, 1))
    assert sum(b.answers[0].final for b in good) >= 3
    assert all(b.answers[0].forwards == 64 and b.answers[0].raw == 64 for b in good)
    broken = Vanilla(str(broken_copy(tmp_path / "broken"))).measure(items, Setting(64, 1))
    assert sum(b.answers[0].final for b in broken) == 0
