# SPDX-License-Identifier: Apache-2.0
"""`vllm-d2f doctor` finds what keeps a machine from serving; `--help` explains every argument."""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
from vllm.platforms import current_platform

from vllm_d2f import doctor
from vllm_d2f.__main__ import main, parser
from vllm_d2f.hub.names import known_names
from vllm_d2f.watch.__main__ import parser as watch_parser

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The command leaves vLLM's messages out; tests behind this one may want them."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
    level = logging.getLogger("vllm").level
    yield
    logging.getLogger("vllm").setLevel(level)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def found(*names: str) -> dict[str, tuple[bool, str]]:
    return {what: (fine, said) for what, fine, said in doctor.diagnose(names)}


def test_the_command():
    """As a program of its own, which is `python -m vllm_d2f`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"vllm-d2f": "vllm_d2f.__main__:main"}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_d2f", "doctor", "d2f-tiny"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok  ") and len(line) < 200 for line in lines)
    assert [line.split()[1] for line in lines] == [
        "packages", "vLLM", "plugin", "attention", "d2f-tiny",
    ]  # fmt: skip


def test_what_is_wrong_is_said_and_is_status_1(capsys, monkeypatch):
    """Offline, nothing is prepared: every published name is listed, and the Hub is out of reach."""
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert all(f" {name} " in said for name in known_names())
    assert f"NO  {'Hub':<23}Dream-org/Dream-v0-Base-7B is out of reach (Offline" in said
    assert "python -m vllm_d2f prepare d2f-dream-7b --base DIR" in said
    with pytest.raises(SystemExit):
        main(["doctor", "d2f-x"])
    assert "unknown; known are d2f-tiny" in capsys.readouterr().err


def test_memory_and_disk(monkeypatch):
    monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *a: int(1e10))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(int(1e9)))
    seen = found("d2f-tiny", "d2f-dream-7b")
    assert seen["d2f-tiny"][0]
    fine, said = seen["d2f-dream-7b"]
    assert not fine and "the device has 10.0 GB: serve it quantised" in said
    fine, said = seen["disk"]
    assert not fine and "1.0 GB free" in said and "set HF_HOME or D2F_CACHE" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(int(1e12)))
    assert found("d2f-dream-7b")["disk"][0]


def test_a_damaged_model(cache_folder):
    (cache_folder / "d2f-dream-7b").mkdir(parents=True)
    fine, said = found("d2f-dream-7b")["d2f-dream-7b"]
    assert not fine and "d2f_merge.json is missing" in said


def test_packages(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "torch" else "99")
    fine, said = found()["packages"]
    assert not fine and "not as required; pip install 'torch>=2.11' 'transformers" in said

    def missing(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    fine, said = found()["packages"]
    assert not fine and "'safetensors>=0.8'" in said


def test_the_plugin(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    fine, said = found()["plugin"]
    assert not fine and "name d2f in VLLM_PLUGINS" in said
    monkeypatch.delenv("VLLM_PLUGINS")
    assert found()["plugin"][0]
    monkeypatch.setattr(doctor, "entry_points", lambda group: ())
    assert not found()["plugin"][0]


def test_a_vllm_that_cannot_be_used(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.1")
    fine, said = found("d2f-tiny")["vLLM"]
    assert not fine and "works with vLLM" in said and "pip install" in said


def levels(of: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    inner = [a.choices for a in of._actions if isinstance(a, argparse._SubParsersAction)]
    return [of, *(level for choices in inner for one in choices.values() for level in levels(one))]


@pytest.mark.parametrize("of", [parser(), watch_parser()], ids=["vllm-d2f", "watch"])
def test_help_says_what_everything_is(of):
    for level in levels(of):
        assert level.description and len(level.format_help()) > 200
        for action in level._actions:
            named = action.help or isinstance(action, argparse._SubParsersAction)
            assert named, (level.prog, action.dest)
    assert {level.prog.split()[-1] for level in levels(parser())} >= {"merge", "doctor", "rm"}
