# SPDX-License-Identifier: Apache-2.0
"""Each contract of .importlinter can fail: an import that it forbids breaks it.

Whether the imports of the code keep the contracts, `make lint` checks.
"""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter comes with the extra dev")

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / ".importlinter"

# Contract -> a file, an import in it that the contract forbids, and what the message names.
VIOLATIONS = {
    "floors": ("vllm_d2f/d2f.py", "import vllm_d2f.startup", "vllm_d2f.startup"),
    "processes": ("vllm_d2f/worker/sampler.py", "import vllm_d2f.scheduler.stream", "scheduler"),
    "algorithm": ("vllm_d2f/window.py", "from vllm.config import VllmConfig", "window -> vllm "),
    "torch": ("vllm_d2f/blocks.py", "import transformers", "blocks -> transformers"),
    "patches": ("vllm_d2f/patches/p04_forget_finished.py", "import vllm_d2f.worker.sampler", "p04"),
    "training": (
        "training/data.py",
        "import vllm_d2f.startup",
        "training.data -> vllm_d2f.startup",
    ),
    "training-directly": ("training/data.py", "import vllm_d2f.settings", "data -> vllm_d2f.sett"),
    "product": ("vllm_d2f/settings.py", "import training.data", "settings -> training.data"),
    "experiments": ("benchmarks/sweep.py", "import benchmarks.serving", "sweep -> benchmarks.serv"),
    "circles": ("vllm_d2f/patches/patch.py", "import vllm_d2f.patches.p04_forget_finished", ".p04"),
}


def contracts() -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(CONFIG)
    prefix = "importlinter:contract:"
    return [name.removeprefix(prefix) for name in parser.sections() if name.startswith(prefix)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The packages where import-linter looks for them, as in `make lint-imports`."""
    python_files = shutil.ignore_patterns("embedded", "results", "configs", "__pycache__")
    for package in ("vllm_d2f", "training", "benchmarks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=python_files)
    shutil.copytree(ROOT / "patches", tmp_path / "vllm_d2f" / "patches", ignore=python_files)
    return tmp_path


def test_every_contract_has_a_violation():
    assert set(contracts()) == set(VIOLATIONS)


@pytest.mark.parametrize("contract", VIOLATIONS)
def test_a_violation_breaks_the_contract(tree: Path, contract: str):
    name, statement, shown = VIOLATIONS[contract]
    file = tree / name
    file.write_text(file.read_text(encoding="utf-8") + f"\n{statement}\n", encoding="utf-8")
    run = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", run, "--no-cache", "--contract", contract, CONFIG],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "0 kept, 1 broken" in done.stdout, done.stdout + done.stderr
    assert shown in " ".join(done.stdout.split())
