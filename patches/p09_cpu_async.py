# SPDX-License-Identifier: Apache-2.0
"""p09: `--async-scheduling` works for D2F models on a CPU."""

from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, is_d2f, patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TARGET = "vllm.platforms.cpu:CpuPlatform.check_and_update_config"


def needed(_config: Any = None) -> bool:
    """Return whether this is a CPU process."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


@patch(
    TARGET,
    apply="process",
    why="vLLM's CPU platform silently switches asynchronous scheduling off. D2F models support it "
    "there, and its tests run on a CPU.",
    how="For a D2F model the flag stays as `vllm_d2f.startup` has set it: off on a CPU unless the "
    "user asks for it. For other models it stays as the original sets it.",
    upstream="none yet: vLLM changes an explicit flag instead of refusing it",
    remove_when="the CPU platform does not change an explicit `--async-scheduling`",
    when="the platform is a CPU",
    needed=needed,
    written_against={TARGET: "d2960ad5d1836767"},
)
def p09_cpu_async(original: Original, cls: type, vllm_config: "VllmConfig") -> None:
    wanted = vllm_config.scheduler_config.async_scheduling
    original(cls, vllm_config)
    if is_d2f(vllm_config.model_config):
        vllm_config.scheduler_config.async_scheduling = wanted
