# SPDX-License-Identifier: Apache-2.0
"""p04: a D2F model state hears which requests are finished; other model states do not."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm_d2f.patches.p04_forget_finished import TARGET
from vllm_d2f.patches.p04_forget_finished import p04_forget_finished as PATCH
from vllm_d2f.patches.patch import function_of, source_hash

from vllm_d2f.worker.model_state import D2FModelState

STEP = SimpleNamespace(finished_req_ids={"a"}, preempted_req_ids={"b"})


def runner(model_state: Any, log: list) -> Any:
    """Return what the stock method uses of the runner."""
    log_removed = lambda req_id, *_, **__: log.append(("removed", req_id))  # noqa: E731
    return SimpleNamespace(
        model_state=model_state, pooling_runner=None, _remove_request=log_removed
    )


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = function_of(vars(GPUModelRunner)["finish_requests"])
    monkeypatch.setattr(GPUModelRunner, "finish_requests", stock)
    PATCH.install()
    PATCH.install()


def test_it_was_written_against_this_vllm():
    found = source_hash(vars(GPUModelRunner)["finish_requests"])
    assert found == PATCH.written_against[TARGET], "read what changed upstream, then renew the hash"


def test_a_d2f_state_hears_of_finished_requests_first(patched: None):
    log: list = []

    class State(D2FModelState):
        def __init__(self) -> None:
            pass

        def forget_requests(self, req_ids: Any) -> None:
            log.append(("forgotten", set(req_ids)))

    GPUModelRunner.finish_requests(runner(State(), log), STEP)
    assert log[0] == ("forgotten", {"a"})
    assert sorted(log[1:]) == [("removed", "a"), ("removed", "b")]


def test_other_states_keep_stock_behaviour(patched: None):
    log: list = []
    GPUModelRunner.finish_requests(runner(SimpleNamespace(), log), STEP)
    assert sorted(log) == [("removed", "a"), ("removed", "b")]


def test_still_needed():
    """Fails when `remove_request` learns why a request leaves: then use that and delete p04."""
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    assert list(inspect.signature(ModelState.remove_request).parameters) == ["self", "req_id"]
