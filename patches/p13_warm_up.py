# SPDX-License-Identifier: Apache-2.0
"""p13: before its first request a D2F engine runs steps that are D2F's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Patch, check_sources, replace

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

NAME = "p13_warm_up"
TARGET = "vllm.v1.worker.gpu_worker:warmup_kernels"
STEPS = "vllm.v1.worker.gpu.warmup:_warmup_kernels"


def _make(original: Callable[..., None]) -> Callable[..., None]:
    def warmup_kernels(
        model_runner: GPUModelRunner,
        worker_execute_model: Callable[[SchedulerOutput], Any],
        worker_sample_tokens: Callable[[GrammarOutput | None], Any],
    ) -> None:
        from vllm_d2f.worker.model_state import D2FModelState

        if not isinstance(model_runner.model_state, D2FModelState):
            return original(model_runner, worker_execute_model, worker_sample_tokens)
        from vllm_d2f.worker.warmup import warm_up

        return warm_up(model_runner, worker_execute_model, worker_sample_tokens)

    return warmup_kernels


def install() -> None:
    """Install the patch; a second call does nothing. `D2FModelState` calls it."""
    check_sources(NAME, PATCH.source_sha256)
    replace(NAME, TARGET, _make)


def apply() -> None:
    """Nothing yet: only a worker warms up."""


def needed() -> bool:
    """Always: vLLM's warm-up knows one token per request and windows that are full."""
    return True


PATCH = Patch(
    name=NAME,
    target=(TARGET,),
    why="On CUDA vLLM's worker first runs steps of its own making: with a grammar's bitmask, which "
    "would be written over hidden states; with the whole canvas as a window where one block is "
    "open, so that tokens of -1 are embedded; and with requests that have no window. A D2F "
    "engine would end there.",
    how="Wraps the function: for a D2F model `vllm_d2f.worker.warmup` runs steps as its scheduler "
    "makes them. Other models keep vLLM's.",
    upstream="none yet: wanted is a warm-up that the model state can replace",
    remove_when="a model state can say which steps warm it up",
    when="always, in workers of a D2F model; vLLM warms up on CUDA without `--enforce-eager`",
    source_sha256={
        TARGET: "911fbe29d6ec1b18cb0dbb1a3ab9c7719d5fb6349830e94b3a5aeae48c6c252b",
        STEPS: "ac83e86438da1a4e1ab704f504f12240a9b9ae200885c95124c401b523d1a9ee",
    },
    apply=apply,
    needed=needed,
    checked_late=True,
)
