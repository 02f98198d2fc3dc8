# SPDX-License-Identifier: Apache-2.0
"""p13: a model state runs its own warm-up steps before the first request."""

from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, patch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

TARGET = "vllm.v1.worker.gpu_worker:warmup_kernels"
STEPS = "vllm.v1.worker.gpu.warmup:_warmup_kernels"


@patch(
    TARGET,
    apply="worker",
    why="On CUDA, without `--enforce-eager`, vLLM's worker first runs steps of its own: with a "
    "grammar's bitmask, which would overwrite hidden states; with the whole canvas as a window "
    "where one block is open, so that tokens of -1 are embedded; and with requests that have no "
    "window. A D2F engine would crash.",
    how="`warm_up` of the model state runs instead, where a model state has that method.",
    upstream="none yet: vLLM lacks a warm-up that the model state can replace",
    remove_when="a model state can say which steps warm it up",
    written_against={TARGET: "911fbe29d6ec1b18", STEPS: "ac83e86438da1a4e"},
)
def p13_warm_up(
    original: Original, model_runner: "GPUModelRunner", *args: Any, **kwargs: Any
) -> None:
    warm_up = getattr(model_runner.model_state, "warm_up", None) or original
    warm_up(model_runner, *args, **kwargs)
