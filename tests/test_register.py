# SPDX-License-Identifier: Apache-2.0
"""The package as a plugin: light to import, found by vLLM, safe to register twice."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from vllm_d2f.patches.patch import SUPPORTED_VLLM

import vllm_d2f
from vllm_d2f.plugin import check_version


def run(code: str) -> list[str]:
    """Return the words that `code` prints in a new Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


PRINT_LOADED = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def test_importing_the_package_imports_nothing_heavy():
    assert not {"vllm", "torch", "transformers"} & set(run(f"import vllm_d2f; {PRINT_LOADED}"))


def test_the_algorithm_needs_torch_only():
    baseline = set(run(f"import torch; {PRINT_LOADED}"))
    loaded = set(run(f"import vllm_d2f.d2f; {PRINT_LOADED}"))
    assert loaded - baseline == {"vllm_d2f"}


MODULES = ["settings", "models", "hub.names", "hub.command", "metrics", "reference", "demo"]


def test_modules_that_users_import_bring_no_vllm():
    """In one process, since each imports torch: the names that vLLM was loaded behind."""
    check = "print(*(['{0}'] if 'vllm' in sys.modules else []))"
    lines = [f"import vllm_d2f.{name}; {check.format(name)}" for name in (*MODULES, "plugin")]
    assert run("import sys\n" + "\n".join(lines)) == []


def test_the_entry_points_resolve():
    (plugin,) = entry_points(group="vllm.general_plugins", name="d2f")
    assert plugin.load() is vllm_d2f.register
    (platform,) = entry_points(group="vllm.platform_plugins", name="d2f")
    assert platform.load()() is None


def test_registering_twice_changes_nothing():
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.sampling_params import SamplingParams

    from vllm_d2f.models import FAMILIES

    vllm_d2f.register()
    hooks = dict(MODELS_CONFIG_MAP)
    check = SamplingParams._validate_diffusion
    vllm_d2f.register()
    assert hooks == MODELS_CONFIG_MAP
    assert SamplingParams._validate_diffusion is check
    assert set(FAMILIES) <= set(ModelRegistry.get_supported_archs())


ACCEPTED = ["0.32.0", "0.32.0rc2", "0.32.1+cpu", "0.33.0rc1", "0.33.2.dev3+gabc"]


@pytest.mark.parametrize("version", ACCEPTED)
def test_versions_it_was_written_against_are_accepted(version):
    check_version(version)


OTHERS = ["0.31.0", "0.31.9", "0.34.0", "0.34.0rc1", "0.34.0.dev7+gabc", "1.0.0", "0.9.2", "dev"]


@pytest.mark.parametrize("version", [*OTHERS, "", None])
def test_other_versions_are_refused_with_the_command_that_helps(version):
    with pytest.raises(RuntimeError, match="VLLM_PLUGINS=") as refusal:
        check_version(version)
    assert f"pip install 'vllm{SUPPORTED_VLLM}'" in str(refusal.value)


def test_a_wrong_version_stops_the_registration(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match=r"found 0\.20\.0"):
        vllm_d2f.register()


def test_without_vllm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match=r"pip install 'vllm-d2f\[cpu\]'"):
        vllm_d2f.register()
