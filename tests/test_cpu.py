# SPDX-License-Identifier: Apache-2.0
"""Data types that a processor has no instructions for: who says so, and when."""

import platform
from pathlib import Path

import pytest
import torch
from checkpoints import write_dream
from vllm.engine.arg_utils import EngineArgs

from training import train
from vllm_d2f import cpu, doctor, startup

WARNING = "no instructions for bfloat16"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads what Linux says of x86")
def test_what_the_processor_has():
    (flags, *_) = (
        line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line
    )
    assert not cpu.emulates(torch.float32)
    wide = {"avx512vl", "avx512bw", "avx512dq"} <= set(flags)
    assert cpu.emulates(torch.bfloat16) is not (wide or "avx_ne_convert" in flags)


@pytest.mark.parametrize(("dtype", "has", "warned"), [
    ("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False),
])  # fmt: skip
def test_the_server(dtype, has, warned, tmp_path, monkeypatch, caplog):
    emulates = lambda dtype: dtype == torch.bfloat16 and not has  # noqa: E731
    monkeypatch.setattr(startup, "emulates", emulates)
    model = str(write_dream(tmp_path / "model", d2f={"block_size": 8, "max_blocks": 2}))
    EngineArgs(
        model=model, dtype=dtype, enforce_eager=True, max_model_len=256
    ).create_engine_config()
    assert (WARNING in caplog.text and "Give --dtype float32." in caplog.text) is warned


@pytest.mark.parametrize("has", [False, True])
def test_doctor(has, monkeypatch):
    monkeypatch.setattr(cpu, "emulates", lambda dtype: not has)
    (said,) = (said for what, _, said in doctor.diagnose(["d2f-tiny"]) if what == "attention")
    assert (WARNING in said and "--dtype float32" in said) is not has


@pytest.mark.parametrize("has", [False, True])
def test_training(has, monkeypatch, capsys):
    monkeypatch.setattr(train, "emulates", lambda dtype: not has)
    train.warn_of_slow_precision("twin")
    said = capsys.readouterr().err
    assert (WARNING in said and "stages.twin.precision=float32" in said) is not has
