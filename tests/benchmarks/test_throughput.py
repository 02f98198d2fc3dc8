# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark: its keys, its units, and that a score is a score."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import throughput
from benchmarks.harness import record, worker
from benchmarks.harness.engine import Answer, Batch, paired
from benchmarks.harness.record import UsageError, environment
from benchmarks.harness.timing import percentiles, spread
from benchmarks.harness.vanilla import Setting, Vanilla, up_to_end
from benchmarks.harness.workload import (
    Item,
    final_number,
    grade,
    load_items,
    parse_options,
    refuse_simulated,
    resolve_model,
)
from benchmarks.throughput import build, markdown, paired_per_answer, point
from training.arithmetic import final_of
from vllm_d2f.hub.names import resolve

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


def test_times_are_milliseconds_and_rates_are_per_second():
    got = point([[batch(0.5, 10)]], has_text=False)
    assert got["time_per_token_ms"]["p50"] == 50.0
    assert got["time_to_first_token_ms"]["p50"] == 250.0
    assert got["useful_tokens_per_s"]["median"] == 20.0
    assert got["step_ms"]["median"] == 250.0


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


def test_generated_answers_are_graded_as_in_training():
    for item in load_items(50, None, 0):
        assert final_number(item.answer) == final_of(item.answer) == item.final


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


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_engine_arguments_are_an_object(text, capsys):
    with pytest.raises(UsageError, match="--engine-args"):
        parse_options("--engine-args", text)
    assert throughput.main(["--engine-args", text]) == 2
    assert "pass an object" in capsys.readouterr().err


def test_a_report_with_made_up_acceptance_says_so():
    runs = {
        throughput.Key(kind, "eager", 1): [[batch(1.0, 10)], [batch(2.0, 10)]]
        for kind in ("d2f", "ar")
    }
    about, names = environment(0, [], "benchmarks.throughput"), {"d2f": "m", "ar": "n"}
    real = build(runs, names, 64, has_text=False) | about
    assert real["simulated_tokens_per_forward"] is None
    assert "SIMULATED" not in "\n".join(markdown(real))
    made_up = build(runs, names, 64, has_text=False, simulated=2.9) | about
    assert made_up["simulated_tokens_per_forward"] == 2.9
    assert "SIMULATED ACCEPTANCE**: 2.9" in markdown(made_up)[2]


def test_scores_of_made_up_text_are_refused():
    config = SimpleNamespace(d2f={"simulate_tokens_per_forward": 2.9})
    with pytest.raises(UsageError, match="--model X.*simulates acceptance.*pass a checkpoint"):
        refuse_simulated("--model X", config, "the score")
    refuse_simulated("--model X", SimpleNamespace(d2f={"block_size": 8}), "the score")
    refuse_simulated("--model X", SimpleNamespace(), "the score")


def test_decoders_share_a_gpu(monkeypatch):
    monkeypatch.setattr(worker, "on_gpu", lambda: True)
    assert worker.most_modes() == ["compiled"]
    assert worker.device_share(3, {"seed": 1}) == {"gpu_memory_utilization": 0.3, "seed": 1}
    own = {"gpu_memory_utilization": 0.5}
    assert worker.device_share(3, own) == own
    monkeypatch.setattr(worker, "on_gpu", lambda: False)
    assert worker.most_modes() == ["eager", "compiled"]
    assert worker.device_share(3, {}) == {}


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


def test_a_stopped_run_reports_its_complete_runs(tmp_path):
    plan = throughput.Plan((), (1, 2), 3, 4, (), 8)
    batches = [record._plain(batch(1.0, 10))]
    keys = ("run 0, batch 1", "run 0, batch 2", "run 1, batch 1")
    points = {key: {"d2f eager": batches, "ar eager": batches} for key in keys}
    runs = throughput.runs_of(plan, points)
    assert runs.keys() == {throughput.Key(k, "eager", n) for k in ("d2f", "ar") for n in (1, 2)}
    assert all(found == [[batch(1.0, 10)]] for found in runs.values())


@pytest.mark.slow
def test_quick(tmp_path):
    file = tmp_path / "throughput.json"
    assert throughput.main(["--quick", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report.keys() >= TOP
    assert list(report)[:4] == ["benchmark", "speedup_vs_ar_batch1", "score_d2f", "score_ar"]
    # How large it is says nothing on a machine that other tests share.
    assert report["speedup_vs_ar_batch1"] == report["d2f_vs_ar"][0]["ratio"]["median"] > 0
    assert report["simulated_tokens_per_forward"] is None
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
        assert 0 < first["p50"] <= first["p99"] and 0 < per_token["p50"] <= per_token["p99"]
    ar = [p for p in report["points"] if p["kind"] == "ar"]
    assert all(p["tokens_per_forward"] == p["computed_per_committed"] == 1 for p in ar)
    for key in ("vllm-d2f", "torch", "transformers"):
        assert key in report["versions"]
    assert str(tmp_path) not in file.read_text()
    assert "| d2f | eager | 1 |" in file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_broken_model_scores_low(tmp_path, broken_model):
    file = tmp_path / "broken.json"
    options = ["--quick", "--ar", "", "--teacher", "", "--json", str(file)]
    assert throughput.main(["--d2f", str(broken_model), *options]) == 0
    report = json.loads(file.read_text())
    assert report["score_d2f"] == report["exact_d2f"] == 0
    assert report["speedup_vs_ar_batch1"] is None


@pytest.mark.slow
def test_made_up_acceptance_is_labelled_everywhere(tmp_path):
    """Dummy weights, 2.9 tokens per forward: timed, and nobody can take it for a model's."""
    file = tmp_path / "simulated.json"
    section = {"block_size": 16, "max_blocks": 4, "simulate_tokens_per_forward": 2.9}
    engine = {"load_format": "dummy", "additional_config": {"d2f": section}}
    options = ["--quick", "--teacher", "", "--engine-args", json.dumps(engine)]
    assert throughput.main([*options, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["simulated_tokens_per_forward"] == 2.9
    assert "SIMULATED ACCEPTANCE" in file.with_suffix(".md").read_text()
    assert report["score_d2f"] == report["score_ar"] == 0
    for p in report["points"]:
        # Up to the limit, whatever end tokens dummy weights propose.
        want = 2.9 if p["kind"] == "d2f" else 1
        assert p["tokens_per_forward"] == pytest.approx(want, rel=0.1)


@pytest.mark.slow
def test_vanilla_is_the_teachers_own_decoding(broken_model):
    """One token per step on a canvas it was trained for answers right; a broken model does not."""
    items = load_items(4, None, 0)
    good = Vanilla(resolve("dream-tiny")).measure(items, Setting(64, 1))
    assert sum(b.answers[0].final for b in good) >= 3
    assert all(b.answers[0].forwards == 64 and b.answers[0].raw == 64 for b in good)
    broken = Vanilla(str(broken_model)).measure(items, Setting(64, 1))
    assert sum(b.answers[0].final for b in broken) == 0
