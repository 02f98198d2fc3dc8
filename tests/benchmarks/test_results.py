# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures are made of what is there, pictures at the width they are read at."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import acceptance, attention, latency, lookahead, serving, sweep, throughput

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EXPERIMENTS = {
    "throughput": throughput,
    "latency_model": latency,
    "sweep": sweep,
    "serving": serving,
    "attention": attention,
    "acceptance": acceptance,
    "lookahead": lookahead,
}


def width(path):
    from matplotlib import image

    return image.imread(path).shape[1]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_committed_text_is_that_of_the_committed_figures(name):
    """`results/NAME.md` says what `results/NAME.json` has."""
    report = json.loads((RESULTS / f"{name}.json").read_text())
    written = (RESULTS / f"{name}.md").read_text()
    assert written == "\n".join(EXPERIMENTS[name].markdown(report)).rstrip() + "\n"
    assert {"command", "seed", "versions", "hardware", "units"} <= report.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_earlier_result_is_drawn_again(name, tmp_path):
    file = tmp_path / f"{name}.json"
    shutil.copy(RESULTS / file.name, file)
    assert EXPERIMENTS[name].main(["--redraw", str(file)]) == 0
    assert json.loads(file.read_text()) == json.loads((RESULTS / file.name).read_text())
    assert file.with_suffix(".md").read_text() == (RESULTS / f"{name}.md").read_text()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    suffixes = getattr(EXPERIMENTS[name], "FIGURES", {})
    assert drawn == {f"{name}{suffix}.png" for suffix in suffixes}
    for picture in drawn:
        assert width(tmp_path / picture) == width(RESULTS / picture) == 1600
