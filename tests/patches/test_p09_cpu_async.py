# SPDX-License-Identifier: Apache-2.0
"""p09: a D2F model keeps `--async-scheduling` on a CPU; other models do not."""

from types import SimpleNamespace

import pytest
from vllm.platforms.cpu import CpuPlatform
from vllm_d2f.patches.p09_cpu_async import TARGET
from vllm_d2f.patches.p09_cpu_async import p09_cpu_async as PATCH
from vllm_d2f.patches.patch import function_of, source_hash

METHOD = "check_and_update_config"


def switch_off(cls, vllm_config):
    vllm_config.scheduler_config.async_scheduling = False


def config(d2f, wanted):
    return SimpleNamespace(
        model_config=SimpleNamespace(d2f=d2f),
        scheduler_config=SimpleNamespace(async_scheduling=wanted),
    )


def test_it_was_written_against_this_vllm():
    found = source_hash(vars(CpuPlatform)[METHOD])
    assert found == PATCH.written_against[TARGET], "read what changed upstream, renew the hash"


@pytest.mark.parametrize("wanted", [True, False])
def test_only_d2f_models_keep_what_was_asked(monkeypatch, wanted):
    monkeypatch.setattr("vllm_d2f.settings.is_d2f", lambda model_config: model_config.d2f)
    patched = PATCH.wrap(TARGET, switch_off)
    ours, other = config(True, wanted), config(False, wanted)
    patched(CpuPlatform, ours)
    patched(CpuPlatform, other)
    assert ours.scheduler_config.async_scheduling is wanted
    assert other.scheduler_config.async_scheduling is False


def test_still_needed():
    """Fails when the CPU platform leaves the flag alone: then delete p09."""
    import inspect

    source = inspect.getsource(function_of(vars(CpuPlatform)[METHOD]))
    assert "scheduler_config.async_scheduling = False" in source
