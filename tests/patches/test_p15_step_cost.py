# SPDX-License-Identifier: Apache-2.0
"""p15: the workers of an engine with adaptive windows measure their steps before the scheduler."""

import inspect
from types import SimpleNamespace

import pytest
from vllm.v1.engine.core import EngineCore
from vllm_d2f.patches.p15_step_cost import TARGET
from vllm_d2f.patches.p15_step_cost import p15_step_cost as PATCH
from vllm_d2f.patches.patch import function_of, source_hash

from vllm_d2f.wire import STEP_SECONDS

METHOD = "_initialize_kv_caches"


class Executor:
    """vLLM's executor, with two workers whose runners have these model states."""

    def __init__(self, model_state):
        runner = SimpleNamespace(model_state=model_state)
        self.workers = [
            SimpleNamespace(model_runner=runner, execute_model="execute", sample_tokens="sample")
        ] * 2
        self.asked = 0

    def collective_rpc(self, function):
        self.asked += 1
        return [function(worker) for worker in self.workers]


def start(monkeypatch, d2f, adaptive, model_state):
    """Run the patched method of an engine. Return what it returned, the config, and the asked."""
    monkeypatch.setattr("vllm_d2f.settings.is_d2f", lambda model_config: d2f)
    monkeypatch.setattr(
        "vllm_d2f.settings.served_settings",
        lambda model_config: SimpleNamespace(adaptive_window=adaptive),
    )
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace()))
    engine = SimpleNamespace(model_executor=Executor(model_state))
    returned = PATCH.wrap(TARGET, lambda self, vllm_config: "caches")(engine, config)
    return returned, config.model_config.hf_config, engine.model_executor.asked


def test_it_was_written_against_this_vllm():
    found = source_hash(vars(EngineCore)[METHOD])
    assert found == PATCH.written_against[TARGET], "read what changed upstream, renew the hash"


def test_the_scheduler_gets_what_the_first_worker_measured(monkeypatch):
    state = SimpleNamespace(step_seconds=lambda runner, *calls: {8: 0.1, 16: 0.2, "by": calls})
    returned, hf_config, asked = start(monkeypatch, True, True, state)
    assert returned == "caches" and asked == 1
    assert getattr(hf_config, STEP_SECONDS) == {8: 0.1, 16: 0.2, "by": ("execute", "sample")}


def test_a_model_state_without_the_method_measures_nothing(monkeypatch):
    _, hf_config, _ = start(monkeypatch, True, True, SimpleNamespace())
    assert getattr(hf_config, STEP_SECONDS) == {}


@pytest.mark.parametrize(("d2f", "adaptive"), [(False, True), (True, False), (True, None)])
def test_other_models_and_fixed_windows_keep_vllms_own(monkeypatch, d2f, adaptive):
    returned, hf_config, asked = start(monkeypatch, d2f, adaptive, None)
    assert returned == "caches" and not asked and not hasattr(hf_config, STEP_SECONDS)


def test_still_needed():
    """Fails when something can run between the workers' caches and the scheduler: read it then."""
    source = inspect.getsource(function_of(vars(EngineCore)["__init__"]))
    _, _, rest = source.partition(f"self.{METHOD}(vllm_config)")
    between, scheduler, _ = rest.partition("self.scheduler: SchedulerInterface = Scheduler(")
    assert scheduler and "self.model_executor" not in between
