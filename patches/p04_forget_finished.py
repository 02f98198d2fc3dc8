# SPDX-License-Identifier: Apache-2.0
"""p04: tell D2F's model state which removed requests will not come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_d2f.patches.patch import Patch, check_sources, replace

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

NAME = "p04_forget_finished"
TARGET = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests"


def _make(original: Callable[..., None]) -> Callable[..., None]:
    def finish_requests(self: GPUModelRunner, scheduler_output: SchedulerOutput) -> None:
        from vllm_d2f.worker.model_state import D2FModelState

        if isinstance(self.model_state, D2FModelState):
            self.model_state.forget_requests(scheduler_output.finished_req_ids)
        original(self, scheduler_output)

    return finish_requests


def install() -> None:
    """Install the patch; a second call does nothing. `D2FModelState` calls it."""
    check_sources(NAME, PATCH.source_sha256)
    replace(NAME, TARGET, _make)


def apply() -> None:
    """Nothing yet: only workers import the runner, and they build a `D2FModelState`."""


def needed() -> bool:
    """Always: the runner reports finished and preempted requests through one call."""
    return True


PATCH = Patch(
    name=NAME,
    target=(TARGET,),
    why="A preempted request keeps its window of undecided blocks and takes it up again; a "
    "finished one must not. `ModelState.remove_request` is called for both alike.",
    how="Wraps the runner's method: a `D2FModelState` hears first which requests are finished. "
    "Other model states see nothing of it.",
    upstream="none yet: wanted is an argument of `ModelState.remove_request`",
    remove_when="`ModelState` can tell a finished request from a preempted one",
    when="always, in workers that serve a D2F model",
    source_sha256={TARGET: "d78030bf2a4431a74aefb0fcaa3161699c5b0852edfdd4f2236c11d9b0bac645"},
    apply=apply,
    needed=needed,
    checked_late=True,
)
