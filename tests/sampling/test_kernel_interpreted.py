# SPDX-License-Identifier: Apache-2.0
"""Without CUDA the kernels run under Triton's interpreter, chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_d2f.sampling import missing


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_confidence_kernel.py runs on the device"
)
def test_confidence_interpreted():
    pytest.importorskip("triton")
    file = Path(__file__).with_name("test_confidence_kernel.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 30 and "skipped" not in run.stdout, run.stdout[-500:]


def test_what_is_missing_is_said():
    assert "CUDA" in missing("cpu")
    if not torch.cuda.is_available():
        # Importing the package of kernels alone imports no Triton.
        code = "import sys, vllm_d2f.sampling; sys.exit('triton' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
