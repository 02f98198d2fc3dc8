# SPDX-License-Identifier: Apache-2.0
"""The stand-ins against vLLM's kernels in Triton's own interpreter, where `triton` is installed."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def test_stand_ins_agree_with_tritons_interpreter():
    if find_spec("triton") is None:
        pytest.skip("the triton package is not installed; the emulator has compared the kernels")
    # In a process of its own, because Triton reads the variable when it is imported.
    tests = str(Path(__file__).with_name("test_cpu_kernels.py"))
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not pad_slot",
            tests,
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "D2F_KERNEL_SEEDS": "3"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0 and passed and int(passed[1]) >= 50, run.stdout[-3000:]
