# SPDX-License-Identifier: Apache-2.0
"""p09: `--async-scheduling` is honoured for D2F models on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_d2f.patches.patch import Patch, replace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NAME = "p09_cpu_async"
TARGET = "vllm.platforms.cpu:CpuPlatform.check_and_update_config"


def _make(original: Callable[..., None]) -> Callable[..., None]:
    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        from vllm_d2f.settings import is_d2f

        wanted = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        if vllm_config.model_config is not None and is_d2f(vllm_config.model_config):
            vllm_config.scheduler_config.async_scheduling = wanted

    return check_and_update_config


def apply() -> None:
    """Install the patch; a second call does nothing."""
    replace(NAME, TARGET, _make)


def needed() -> bool:
    """Whether this is a CPU process."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


PATCH = Patch(
    name=NAME,
    target=(TARGET,),
    why="vLLM's CPU platform switches asynchronous scheduling off without a word. D2F models can "
    "have it there, and a CPU is where it is tested.",
    how="Wraps the method: for a D2F model the flag stays what `vllm_d2f.startup` decided, off on "
    "a CPU unless the user asks. Other models keep what the original sets.",
    upstream="none yet: wanted is an error for an explicit flag instead of a silent change",
    remove_when="the CPU platform leaves an explicit `--async-scheduling` alone",
    when="the platform is a CPU",
    source_sha256={TARGET: "d2960ad5d183676793d6988a9a4ed50175d18dbf8baf70fc01f686d50887a0df"},
    apply=apply,
    needed=needed,
)
