# SPDX-License-Identifier: Apache-2.0
"""p15: an engine with adaptive windows measures its steps before its scheduler starts."""

from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, is_d2f, patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.core import EngineCore

TARGET = "vllm.v1.engine.core:EngineCore._initialize_kv_caches"


@patch(
    TARGET,
    apply="process",
    why="The scheduler chooses how much of each window a step computes by what steps cost on this "
    "machine. vLLM has no point between the caches of the workers and its scheduler at which the "
    "workers could run steps and tell the scheduler.",
    how="Once the caches are there, all workers run `step_seconds` of their model state, where it "
    "has that method. The result goes to the scheduler in the model's config.",
    upstream="none yet: vLLM keeps measured costs of speculative decoding per worker",
    remove_when="vLLM hands what its workers measured at start-up to the scheduler",
    written_against={TARGET: "47b605622969996d"},
)
def p15_step_cost(
    original: Original, self: "EngineCore", vllm_config: "VllmConfig", *args: Any, **kwargs: Any
) -> Any:
    from vllm_d2f.settings import served_settings
    from vllm_d2f.wire import STEP_SECONDS

    cache_config = original(self, vllm_config, *args, **kwargs)
    model_config = vllm_config.model_config
    if is_d2f(model_config) and served_settings(model_config).adaptive_window:
        seconds = self.model_executor.collective_rpc(_step_seconds)[0]
        setattr(model_config.hf_config, STEP_SECONDS, seconds)
    return cache_config


def _step_seconds(worker: Any) -> dict[int, float]:
    runner = worker.model_runner
    measure = getattr(getattr(runner, "model_state", None), "step_seconds", None)
    return measure(runner, worker.execute_model, worker.sample_tokens) if measure else {}
