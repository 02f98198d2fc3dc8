# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures are made of what is there, pictures at the width they are read at."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks import (
    acceptance,
    attention,
    latency,
    lookahead,
    projection,
    serving,
    sweep,
    throughput,
)

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
    "projection": projection,
}


def commands():
    """File and command of every result that names one."""
    for path in sorted(RESULTS.rglob("*.json")):
        report = json.loads(path.read_text())
        if "command" in report:
            on_gpu = "gpu" in report.get("hardware", ())
            yield pytest.param(report["command"], on_gpu, id=str(path.relative_to(RESULTS)))


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


@pytest.mark.parametrize(("command", "on_gpu"), commands())
def test_a_result_names_a_command_that_runs(command, on_gpu, monkeypatch):
    """Its module and its options exist; a shell splits it as it was given."""
    program, *words = shlex.split(command)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        names = [word.partition("=")[0] for word in words[1:]]
        assert all(re.search(rf"^{name} \?=", makefile, re.M) for name in names)
        assert re.search(rf"^{words[0]}:", makefile, re.M)
        return
    (_, module, *given) = words
    assert [program, words[0]] == ["python", "-m"]
    # Parsers ask for the device that it was measured on.
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    loaded = importlib.import_module(module)
    if hasattr(loaded, "parse"):
        loaded.parse(given)  # a SystemExit where it does not take them
    else:
        source = Path(loaded.__file__).read_text()
        assert all(f'"{word}"' in source for word in given if word.startswith("--"))
