# SPDX-License-Identifier: Apache-2.0
"""p04: a model state learns which removed requests are finished, and which are preempted only."""

from typing import TYPE_CHECKING

from vllm_d2f.patches.patch import Original, patch

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

TARGET = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests"


@patch(
    TARGET,
    apply="worker",
    why="A preempted request keeps its window of open blocks and resumes it later; a finished "
    "request must not. `ModelState.remove_request` is called for both alike.",
    how="Before the original runs, `forget_requests` of the model state is called with the "
    "finished requests. Model states without that method are not asked.",
    upstream="none yet: `ModelState.remove_request` lacks an argument for it",
    remove_when="`ModelState` can tell a finished request from a preempted one",
    written_against={TARGET: "d78030bf2a4431a7"},
)
def p04_forget_finished(
    original: Original, self: "GPUModelRunner", scheduler_output: "SchedulerOutput"
) -> None:
    forget = getattr(self.model_state, "forget_requests", None)
    if forget is not None:
        forget(scheduler_output.finished_req_ids)
    original(self, scheduler_output)
