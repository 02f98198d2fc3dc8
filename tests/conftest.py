# SPDX-License-Identifier: Apache-2.0
"""For all tests: imports from the repository root and from this folder, and no network.

Stress tests (`make stress`) run only where `-m` names them.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Before anything imports torch, transformers or vLLM. Servers that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Else engines of test processes that run side by side bind to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stress")
    group.addoption("--stress-minutes", type=float, default=6, help="of the soak; 60 as published")
    group.addoption("--stress-results", type=Path, help="folder for reliability_NAME.json files")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "stress" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("stress")]
    items[:] = [item for item in items if not item.get_closest_marker("stress")]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a device where there is none: `benchmarks.kernels` runs such tests alone."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def stress_result(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that writes what a stress test measured, and fails if it found failures."""
    from benchmarks.harness.record import environment

    minutes = request.config.getoption("--stress-minutes")
    machine = environment(0, [], "")  # before the test, for the load average
    machine["command"] = f"make stress MINUTES={minutes:g}"

    def keep(name: str, report: dict[str, Any], failures: list[str]) -> None:
        report = machine | report | {"passed": not failures}
        if folder := request.config.getoption("--stress-results"):
            path = folder / f"reliability_{name}.json"
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        assert not failures, json.dumps(report, indent=1)[-6000:]

    return keep
