# SPDX-License-Identifier: Apache-2.0
"""Steps carried over to other machines and shapes, and the ratios that follow, worked by hand."""

import json

import pytest

from benchmarks import projection
from benchmarks.harness import cost, shapes
from benchmarks.harness.cost import Cost, Projected, Trace

MACHINE = {"copy_gb_per_s": 4000.0, "matmul_gflop_per_s": 800000.0}
WEIGHTS = 14.140571648e9
"""Bytes of Qwen2.5-7B's matrices in bfloat16; a token takes as many operations."""
READ_MS, TOKEN_MS = WEIGHTS / 4000e9 * 1e3, WEIGHTS / 800e12 * 1e3


def point(tokens, ms):
    return {"tokens": tokens, "context_tokens": 0, "ms": ms}


def steps_file(*more):
    """Steps at half the bandwidth and 80 % of the arithmetic, with 3 ms beside in a small one."""
    points = {
        "qwen/steps/512/1/1": point(1, 2 * READ_MS),
        "dream/steps/512/4/1": point(128, 2 * READ_MS + 3),
        "dream/steps/512/4/64": point(8192, 1.25 * 8192 * TOKEN_MS),
        **dict(more),
    }
    return {"points": points, "floor": MACHINE, "hardware": {"cpu": "x", "threads": 1}}


def test_what_steps_reached_and_what_they_take_beyond():
    measured = steps_file()["points"]
    ar, d2f = (cost.steps_of(measured, shape) for shape in ("qwen", "dream"))
    reached = cost.reached(ar, d2f, "dream", MACHINE)
    assert reached == pytest.approx({"copy_gb_per_s": 2000.0, "matmul_gflop_per_s": 640000.0})
    beyond = dict(cost.beyond([*d2f, point(64, READ_MS)], "dream", reached))
    # A step that is faster than its floor at those speeds takes nothing beyond.
    assert beyond == pytest.approx({64.0: 0.0, 128.0: 3.0, 8192.0: 0.0}, abs=1e-6)


def test_a_step_is_its_floor_and_what_lies_between_measured_sizes():
    step = Projected("qwen", MACHINE, beyond=((100.0, 4.0), (200.0, 2.0)))
    assert step.ms(10, 0) == pytest.approx(READ_MS + 4)
    assert step.ms(150, 0) == pytest.approx(READ_MS + 3)
    assert step.ms(8000, 0) == pytest.approx(8000 * TOKEN_MS + 2)
    # 28 layers of 4 key heads of 128: 57,344 bytes for each cached token.
    assert step.ms(10, 1e6) == pytest.approx(READ_MS + 57344e6 / 4000e9 * 1e3 + 4)


def test_eight_gpus_share_the_bytes_and_reduce_twice_a_layer():
    step = Projected("llama70b", MACHINE, gpus=8, reduce_us=15.0, reduce_gb_per_s=400.0)
    # 80 layers: 160 reductions of 15 us; each moves 7/4 of 8192 values of 2 bytes per token.
    weights = shapes.weight_bytes("llama70b")["step"]
    moved_ms = 160 * (1.75 * 128 * 8192 * 2) / 400e9 * 1e3
    assert step.ms(128, 0) == pytest.approx(weights / 8 / 4000e9 * 1e3 + 2.4 + moved_ms)


def test_the_70b_shape():
    """Its matrices without the embedding: 69.5 billion weights."""
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert shapes.weight_bytes("llama70b")["step"] == 2 * (80 * layer + 8192 * 128256)
    assert shapes.kv_bytes_per_token("llama70b") == 80 * 2 * 8 * 128 * 2


def test_an_h100_reaches_the_same_share_of_its_data_sheet():
    reached = {"copy_gb_per_s": 2400.0, "matmul_gflop_per_s": 600000.0}
    assert projection.on("7B, H200", reached) == Projected("qwen", reached)
    there = projection.on("7B, H100", reached).reached
    assert there == pytest.approx({"copy_gb_per_s": 1675.0, "matmul_gflop_per_s": 600000.0})
    # What the host adds grows from 28 layers to 80.
    (ar, d2f), *_ = projection.pairs("70B, 8 H100", reached, [((100.0, 7.0),)])
    assert d2f.ms(100, 0) - ar.ms(100, 0) == pytest.approx(20.0)
    (ar, d2f), *_ = projection.pairs("7B, H100", reached, [((100.0, 7.0),)])
    assert d2f.ms(100, 0) - ar.ms(100, 0) == pytest.approx(7.0)


def test_a_profile_is_scaled_in_what_a_forward_decides_beyond_one_token():
    like = Trace(1, 1, 256, 512)
    found = projection.scaled([Trace(2, 8, 50, 40), Trace(3, 14, 50, 40)], 5.0, 4.0, like)
    assert found == [Trace(3, 32, 256, 512), Trace(5, 56, 256, 512)]


def test_adaptation_takes_the_window_that_is_fastest_in_each_case():
    plain = Trace(1, 1, 100, 0)
    narrow, wide = Trace(2, 8, 100, 0), Trace(3, 30, 100, 0)
    ar, free, dear = Cost(10.0), Cost(10.0), Cost(10.0, 1.0)
    # One request, in tokens per second: AR 100; wide 300 where tokens are free; where one takes a
    # millisecond, narrow 2 in 18 ms, wide 3 in 40 ms.
    steps = [(ar, dear), (ar, dear), (ar, free)]
    found = projection.cell(steps, [[narrow, wide]], plain, 1)
    assert found["fixed"] == {"min": 0.75, "median": 0.75, "max": 3.0}
    assert found["adaptive"] == {"min": 1.111, "median": 1.111, "max": 3.0}
    assert found["blocks"] == 1
    free_middle = projection.cell([(ar, dear), (ar, free), (ar, free)], [[narrow, wide]], plain, 4)
    assert free_middle["blocks"] == 2 and free_middle["adaptive"]["median"] == 3.0


def speed(tokens_per_s, **more):
    prompt = {"prompt_tokens": 8, "answer_tokens": 4, "token_budget": 9999}
    return {"tokens_per_s": tokens_per_s, **prompt, **more}


def test_the_check_compares_batches():
    """Two forwards of 20 ms against four of 10 ms: AR is measured 25 % faster than that."""
    window = {"tokens_per_forward": 2.0, "window_tokens": 8}
    points = {"dream/speed/2/1": speed(100.0, **window), "qwen/speed/1/1": speed(125.0)}
    (row,) = projection.check(points, Cost(10.0), Cost(20.0))
    assert row["predicted"] == 1.0 and row["measured"] == 0.8
    assert (row["error"], row["error_d2f"], row["error_ar"]) == (0.25, 0.0, -0.2)


@pytest.fixture
def report():
    """Of made-up steps; the assumptions are the experiment's own."""
    args = projection.parse(["--batch-sizes", "1", "64", "256"])
    steps, profile = steps_file(), [Trace(2, 8, 50, 40), Trace(3, 14, 50, 40)]
    parts = projection.build(steps, *projection.engines(steps, steps), profile, 8, args)
    rows = [
        {"blocks": n, **one.as_dict(), "score": 0.9, "score_interval": [0.8, 1.0]}
        for n, one in enumerate(profile, 1)
    ]
    about = {"command": "c", "model": "m", "job": "exact", "prompts": 3, "score": "exact"}
    return {**about, "settings": {"tau_add": 0.1}, "profile": rows, **parts}


def test_every_cell_has_a_range_and_adaptation_is_never_slower(report):
    assert list(report["tables"]) == list(projection.TARGETS)
    for rows in report["tables"].values():
        assert [row["batch_size"] for row in rows] == [1, 64, 256]
        for row, name in ((row, name) for row in rows for name in ("dream", "small")):
            fixed, adaptive = row[f"{name}_fixed"], row[f"{name}_adaptive"]
            for one in (fixed, adaptive):
                assert one["min"] < one["median"] < one["max"]
            assert all(adaptive[end] >= fixed[end] for end in fixed)
            assert row[f"{name}_blocks"] in (1, 2)
        assert rows[0]["dream_adaptive"]["median"] > rows[-1]["dream_adaptive"]["median"]


def test_the_page_says_what_is_predicted_and_what_published(report, tmp_path):
    text = "\n".join(projection.markdown(report))
    assert "**Predicted, not measured**" in text and "## Assumed" in text
    assert "{" not in text.replace('{"tau_add": 0.1}', "")
    for name, ratios in projection.PUBLISHED.items():
        for size, ratio in ratios.items():
            assert (f"| {name} {ratio:g} | {size} |" in text) == (size in (1, 64, 256))
    for size, ratio in projection.PUBLISHED["EAGLE-3"].items():
        assert f"- {size} at once on an H100, EAGLE-3 {ratio:g}: " in text
    projection.draw(report, tmp_path / "projection.png")
    assert (tmp_path / "projection.png").stat().st_size > 10_000


def test_the_verdict_counts_where_d2f_is_ahead(report):
    names = ("dream_fixed", "dream_adaptive", "small_adaptive")
    for rows in report["tables"].values():
        for row, ratio in zip(rows, (2.0, 1.0, 0.5), strict=True):
            row |= dict.fromkeys(names, {"min": ratio / 2, "median": ratio, "max": 2 * ratio})
    first, *_, last = projection.verdict(report)
    assert "AR are, 2 blocks of 32: 64 (1 to 256); adaptive" in first
    assert "At 256 adaptation makes blocks of 32 1 times as fast" in first
    assert "reach 0.5 (0.25 to 1) of AR" in first
    assert last.startswith("- 64 at once on an H100, EAGLE-3 1.38: 2 blocks of 32 1 (0.5 to 2)")


def test_d2f_is_ahead_up_to_the_first_size_at_which_it_is_slower():
    rows = [
        {"batch_size": 2**n, "x": {"min": low, "max": 2}}
        for n, low in enumerate((1.1, 1, 0.9, 1.2))
    ]
    assert projection.up_to(rows, "x", "min") == 2 and projection.up_to(rows, "x", "max") == 8
    assert projection.up_to(rows[2:], "x", "min") == 0


def test_where_a_published_ratio_lies():
    cell = {"min": 1.0, "max": 2.0}
    found = [projection.beside(cell, ratio) for ratio in (0.5, 1.5, 2.5)]
    assert [words.split()[0] for words in found] == ["above", "which", "below"]


@pytest.mark.parametrize("option", ["--steps", "--piecewise"])
def test_without_steps_it_says_what_to_run(option, tmp_path, capsys):
    file = tmp_path / "steps.json"
    assert projection.main([option, str(file)]) == 2
    file.write_text(json.dumps({"points": {}, "floor": MACHINE}))
    assert projection.main([option, str(file)]) == 2
    assert "pass a result of benchmarks.steps" in (said := capsys.readouterr().err)
    assert "need steps of dream" in said


@pytest.mark.slow
def test_quick(tmp_path):
    out = tmp_path / "projection.json"
    assert projection.main(["--quick", "--blocks", "2", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    narrow, wide = report["profile"]
    assert narrow["window_tokens"] < wide["window_tokens"]
    assert 1 < narrow["tokens_per_forward"] < wide["tokens_per_forward"]
    assert str(tmp_path) not in out.read_text()
