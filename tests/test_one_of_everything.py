# SPDX-License-Identifier: Apache-2.0
"""Helpers that were once written several times exist once: a copy for a new caller is an error."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vllm_d2f", "patches", "training", "benchmarks")

ONCE = {
    r"\.pin_memory\(": "vllm_d2f/window.py",  # to_device; beside it there is vLLM's own
    r"\bos\.fsync\(": "vllm_d2f/hub/cache.py",
    r"def (final|last)_number\(": "vllm_d2f/demo.py",
    r"TORCH_CPP_LOG_LEVEL": "vllm_d2f/demo.py",  # the environment of a quiet engine
    r">=0\.32": "patches/patch.py",
    r"^HEAD_SIZES = ": "vllm_d2f/attention/selection.py",
    r"\.d2f\[": "",  # settings are read as `Settings`, never out of the section
    r"^class Partial\b": "vllm_d2f/sampling/tensor_parallel.py",
    r"\bwindow\.counters\b": "",  # only window.py knows the columns
    r"^\s*(import|from) numba\b": "",  # there is no second algorithm for a CPU
}
"""What stands in one file only, as a regular expression -> that file; or in none."""


@pytest.mark.parametrize("pattern", ONCE)
def test_it_is_written_once(pattern):
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    found = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert found == ([ONCE[pattern]] if ONCE[pattern] else [])


def test_a_family_is_named_in_its_file_only():
    from vllm_d2f.models import FAMILIES

    names = "|".join(map(re.escape, FAMILIES))
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.parent != ROOT / "vllm_d2f" / "models":
                assert not re.search(rf"\b({names})\b", path.read_text(encoding="utf-8")), path
