# SPDX-License-Identifier: Apache-2.0
"""p02: D2F models start on the V2 model runner on a CPU whose Triton has no CPU backend."""

from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, is_d2f, patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CHOICE = "vllm.config.vllm:VllmConfig.use_v2_model_runner"
CHECK = "vllm.config.vllm:VllmConfig._validate_v2_model_runner"
CPU_WITHOUT_TRITON = "the platform is a CPU and Triton has no CPU backend"


def needed(_config: Any = None) -> bool:
    """Return whether this is a CPU process without Triton's CPU backend.

    `HAS_TRITON` is vLLM's own answer: on its CPU build it is true only if the `cpu` backend is
    among Triton's, so the `triton` wheel from PyPI (CUDA and ROCm only) does not count.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


@patch(
    CHOICE,
    apply="process",
    why="Diffusion models need the V2 model runner, and without Triton vLLM falls back to V1 or "
    "refuses to start. Triton's CPU backend is not on PyPI.",
    how="For D2F models the runner is V2 unless `VLLM_USE_V2_MODEL_RUNNER` is set, and the check "
    "at start-up no longer asks for Triton but for everything else. Other models keep vLLM's "
    "choice (V1).",
    upstream="vLLM is moving V2 kernels to platform overrides (`register_kernels`)",
    remove_when="the V2 runner starts on a CPU without Triton, or triton-cpu is on PyPI",
    when=CPU_WITHOUT_TRITON,
    needed=needed,
    written_against={CHOICE: "515385db129cfb73", CHECK: "1264ae02af3433ee"},
)
def p02_cpu_start(original: Original, self: "VllmConfig") -> bool:
    from vllm import envs

    # With the variable set to 0 vLLM refuses: "V1 does not support diffusion models".
    if envs.VLLM_USE_V2_MODEL_RUNNER is None and is_d2f(self.model_config):
        return True
    return original(self)


@p02_cpu_start.also(CHECK)
def _check(original: Original, self: "VllmConfig") -> None:
    if not is_d2f(self.model_config):
        return original(self)
    # The original checks that Triton is there and that the runner has all features asked for. p03
    # stands in for Triton; the features must still be checked. One thread makes a configuration,
    # before any engine runs, so no other code sees the flag change.
    from vllm.config import vllm as config_module

    stock = config_module.HAS_TRITON
    config_module.HAS_TRITON = True
    try:
        original(self)
    finally:
        config_module.HAS_TRITON = stock
