# SPDX-License-Identifier: Apache-2.0
"""p03: numpy versions of the Triton kernels that the V2 model runner launches for a D2F model."""

import sys
from collections.abc import Callable
from typing import Any

from vllm_d2f.patches.p02_cpu_start import CPU_WITHOUT_TRITON, needed
from vllm_d2f.patches.patch import Original, check_parameters, check_sources, find, patch, replace

NAME = "p03_cpu_kernels"
HOOK = "vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides"
SCAN = "vllm.triton_utils.dispatcher:_rebind_kernels"

_INPUT_BATCH = "vllm.v1.worker.gpu.input_batch"
_BUFFERS = "vllm.v1.worker.gpu.buffer_utils"
_TABLES = "vllm.v1.worker.gpu.block_table"

# What is replaced, and its source's hash. A worker checks the sources of all; other processes must
# not import the modules. Kernels are replaced through vLLM's own `register_kernels`.
KERNELS = {
    f"{_INPUT_BATCH}:_prepare_prefill_inputs_kernel": "96d1b0d0dffd63d4",
    f"{_INPUT_BATCH}:_prepare_pos_seq_lens_kernel": "33c07567a9fe63e1",
    f"{_INPUT_BATCH}:_combine_sampled_and_draft_tokens_kernel": "c02435e0be07b2fa",
    f"{_INPUT_BATCH}:_post_update_kernel": "1f8738a0c9e9928a",
    f"{_INPUT_BATCH}:_expand_idx_mapping_kernel": "7636f8d252d474bf",
    f"{_BUFFERS}:_apply_write_kernel": "8f46fe0cc9897007",
}
# The kernels that these methods launch get raw pointers, and one needs its grid, which
# `register_kernels` does not pass on. The methods are replaced, and do what their kernels do.
METHODS = {
    f"{_TABLES}:BlockTables.gather_block_tables": "871191e91a4e3286",
    f"{_TABLES}:BlockTables.compute_slot_mappings": "d62049117725d625",
    f"{_BUFFERS}:FusedStagedWriter.apply": "42b569d01807d61e",
}
LAUNCHED = {
    f"{_TABLES}:_gather_block_tables_kernel": "e9f87a675c06a40b",
    f"{_TABLES}:_compute_slot_mappings_kernel": "a20a277ea0a5b778",
}


def replacement(target: str) -> Callable[..., Any]:
    """Return the function of `cpu_kernels` for a kernel `_NAME_kernel`, or for a method `NAME`."""
    from vllm_d2f.patches import cpu_kernels

    name = target.replace(":", ".").rpartition(".")[2]
    return vars(cpu_kernels)[name.removeprefix("_").removesuffix("_kernel")]


def register() -> None:
    """Register the replacements in a worker. A second call changes nothing."""
    from vllm.triton_utils import triton
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
    from vllm.utils.math_utils import next_power_of_2

    # The functions that launch the kernels compute a block size with this; vLLM's placeholder
    # for a missing Triton has `cdiv` but not this one.
    triton.next_power_of_2 = next_power_of_2

    kernels = {target: find(NAME, target)[2] for target in KERNELS}
    # An override is of an earlier call, or vLLM's own.
    stock = {t: kernel for t, kernel in kernels.items() if not isinstance(kernel, KernelOverride)}
    for target, kernel in stock.items():
        check_parameters(NAME, target, kernel, replacement(target))
    if stock:
        check_sources(NAME, {target: KERNELS[target] for target in stock} | METHODS | LAUNCHED)
        register_kernels({target.replace(":", "."): replacement(target) for target in stock})
    for target in METHODS:
        replace(NAME, target, lambda _original, target=target: replacement(target))


@patch(
    HOOK,
    apply="process",
    why="The V2 model runner prepares its batch with Triton kernels. Without Triton's CPU backend "
    "the first launch fails.",
    how="When a worker starts, vLLM lets its platform register replacements of kernels. On a CPU "
    "ours are registered right after vLLM's own, through the same `register_kernels`: numpy on "
    "views of the same tensors, for "
    + ", ".join(f"`{target.rpartition(':')[2]}`" for target in (*KERNELS, *METHODS))
    + ". Models on the V1 runner launch none of these. vLLM's search for references to the kernels "
    "skips the modules of llvmlite, where it fails in a process that has loaded Numba.",
    upstream="`CpuPlatform.register_triton_kernel_overrides` does this for the V1 runner's kernels",
    remove_when="vLLM registers CPU versions of these kernels, or triton-cpu is on PyPI",
    when=CPU_WITHOUT_TRITON,
    needed=needed,
    written_against={HOOK: "950067cb061535be", SCAN: "68f705141997c1e3"},
)
def p03_cpu_kernels(original: Original, cls: type) -> None:
    original(cls)
    register()


@p03_cpu_kernels.also(SCAN)
def _rebind_kernels(original: Original, overrides: list[Any]) -> None:
    # The search reads `__dict__` of each module. `llvmlite.binding.ffi.lib` answers every attribute
    # with a C function, on which the search fails. It holds no kernel.
    names = [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]
    hidden = {name: sys.modules.pop(name) for name in names}
    try:
        original(overrides)
    finally:
        sys.modules.update(hidden)
