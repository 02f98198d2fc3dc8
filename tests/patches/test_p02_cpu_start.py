# SPDX-License-Identifier: Apache-2.0
"""p02: on a CPU without Triton, D2F models and no others run on the V2 model runner."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import vllm.platforms
import vllm.triton_utils
from vllm import envs
from vllm.config import VllmConfig
from vllm.config import vllm as config_module
from vllm_d2f.patches.p02_cpu_start import needed
from vllm_d2f.patches.p02_cpu_start import p02_cpu_start as PATCH
from vllm_d2f.patches.p03_cpu_kernels import p03_cpu_kernels
from vllm_d2f.patches.patch import function_of, source_hash

NAMES = ("use_v2_model_runner", "_validate_v2_model_runner")


def config(is_d2f: bool | None, unsupported: tuple[str, ...] = ()) -> Any:
    """Return what the two functions read of a `VllmConfig`; None: one without a model."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        model_config=None if is_d2f is None else SimpleNamespace(is_d2f=is_d2f),
        _get_v2_model_runner_unsupported_features=lambda: list(unsupported),
    )


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without Triton, with the patch, for one test."""
    settings = ModuleType("vllm_d2f.settings")
    settings.is_d2f = lambda model_config: model_config.is_d2f
    monkeypatch.setitem(sys.modules, "vllm_d2f.settings", settings)
    monkeypatch.setattr(config_module, "HAS_TRITON", False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    choice, check = (function_of(vars(VllmConfig)[name]) for name in NAMES)
    monkeypatch.setattr(VllmConfig, NAMES[0], property(choice))
    monkeypatch.setattr(VllmConfig, NAMES[1], check)
    PATCH.install()
    PATCH.install()


def choose(settings: Any) -> bool:
    return VllmConfig.use_v2_model_runner.fget(settings)


def test_it_was_written_against_this_vllm():
    for target in PATCH.replacements:
        found = source_hash(vars(VllmConfig)[target.rpartition(".")[2]])
        assert found == PATCH.written_against[target], f"read what changed in {target}"


def test_d2f_models_start_on_v2(patched: None):
    assert choose(config(True)) is True
    VllmConfig._validate_v2_model_runner(config(True))
    assert config_module.HAS_TRITON is False  # put back


def test_features_v2_lacks_are_still_refused(patched: None):
    with pytest.raises(ValueError, match="does not yet support: dual batch overlap"):
        VllmConfig._validate_v2_model_runner(config(True, ("dual batch overlap",)))
    assert config_module.HAS_TRITON is False


@pytest.mark.parametrize("is_d2f", [False, None])
def test_other_models_keep_stock_behaviour(patched: None, is_d2f: bool | None):
    """Whatever that is: vLLM 0.32 refuses here, 0.33 falls back to the V1 runner."""
    assert choose(config(is_d2f)) is False
    stock = function_of(vars(VllmConfig)[NAMES[1]])
    assert outcome(VllmConfig._validate_v2_model_runner, is_d2f) == outcome(stock, is_d2f)


def outcome(check: Any, is_d2f: bool | None) -> str:
    try:
        return repr(check(config(is_d2f)))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("value", ["0", "1"])
@pytest.mark.parametrize("is_d2f", [True, False])
def test_the_users_variable_wins(
    patched: None, monkeypatch: pytest.MonkeyPatch, value: str, is_d2f: bool
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
    assert choose(config(is_d2f)) is (value == "1")


@pytest.mark.parametrize("is_cpu, has_triton", [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("patch", [PATCH, p03_cpu_kernels])
def test_not_applied_elsewhere(monkeypatch, patch, is_cpu: bool, has_triton: bool):
    """On CUDA, and on a CPU whose Triton has a CPU backend."""
    platform = SimpleNamespace(is_cpu=lambda: is_cpu)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", has_triton)
    assert not patch.needed(None)


def test_applied_on_a_cpu_without_triton(monkeypatch: pytest.MonkeyPatch):
    platform = SimpleNamespace(is_cpu=lambda: True)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", False)
    assert needed()


def test_still_needed(monkeypatch: pytest.MonkeyPatch):
    """Fails when stock vLLM starts V2 on a CPU without Triton: then delete p02."""
    if not needed():
        pytest.skip("Triton has a CPU backend, or this is not a CPU")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert envs.VLLM_USE_V2_MODEL_RUNNER is None
    choice, check = (function_of(vars(VllmConfig)[name]) for name in NAMES)
    assert choice(config(True)) is False
    with pytest.raises(ValueError, match="requires Triton"):
        check(config(True))
