# SPDX-License-Identifier: Apache-2.0
"""Pictures are drawn from what is there, at the width they are read at."""

import json

import pytest

from benchmarks import (
    attention,
    latency_model,
    plots,
    serving_report,
    sweep_report,
    throughput_report,
)
from vllm_d2f.hub.names import resolve


@pytest.fixture
def report():
    def point(kind, mode, size, speed):
        speeds = {"median": speed, "min": speed / 2, "max": speed * 2}
        return dict(kind=kind, mode=mode, batch_size=size, useful_tokens_per_s=speeds, score=0.5)

    points = [point(k, "eager", n, 10.0 * n) for k in ("d2f", "ar") for n in (1, 2, 4)]
    return {
        "score_d2f": 1.0,
        "score_ar": 0.98,
        "points": [*points, point("vanilla", "512:1", 1, 1.0)],
    }


def width(path):
    from matplotlib import image

    return image.imread(path).shape[1]


def test_draws_what_is_there(tmp_path, report):
    (tmp_path / "throughput.json").write_text(json.dumps(report))
    assert plots.main(["--results", str(tmp_path), "--d2f", ""]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"throughput.png"}
    assert width(tmp_path / "throughput.png") == 1600


@pytest.mark.parametrize("name", ["throughput", "latency_model", "sweep", "serving", "attention"])
def test_the_committed_text_is_that_of_the_committed_figures(name):
    """`results/NAME.md` says what `results/NAME.json` has."""
    reports = {
        "throughput": throughput_report.markdown,
        "latency_model": latency_model.markdown,
        "sweep": sweep_report.markdown,
        "serving": serving_report.markdown,
        "attention": attention.markdown,
    }
    report = json.loads((plots.RESULTS / f"{name}.json").read_text())
    written = (plots.RESULTS / f"{name}.md").read_text()
    assert written == reports[name](report) + "\n"
    assert {"command", "seed", "versions", "hardware", "units"} <= report.keys()


def test_committed_results_are_drawn_at_reading_width(tmp_path):
    assert plots.main(["--out", str(tmp_path), "--d2f", ""]) == 0
    serving = json.loads((plots.RESULTS / "serving.json").read_text())
    serving_report.plot(serving, tmp_path / "serving.png")
    names = {"throughput", "latency_model", "latency_model_forward_cost", "sweep", "serving"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    for name in names:
        assert width(tmp_path / f"{name}.png") == width(plots.RESULTS / f"{name}.png") == 1600


def test_no_folder(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path / "no")]) == 2
    assert "pass where the JSON is" in capsys.readouterr().err


def test_timeline_shows_several_blocks(tmp_path):
    question = plots.load_items(5, None, 2)[-1].question
    frames = plots.decode_frames(resolve("d2f-tiny"), question, block_size=4, tau_conf=0.9999)
    assert frames[-1].done and len(frames) > 2
    # The pipeline: blocks are open at the same time.
    assert max(len(f.activated) for f in frames) >= 2
    plots.timeline(frames, tmp_path / "timeline.png", "a problem")
    assert width(tmp_path / "timeline.png") == 1600
