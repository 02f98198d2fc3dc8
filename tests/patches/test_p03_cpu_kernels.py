# SPDX-License-Identifier: Apache-2.0
"""p03: the stand-ins are registered when a worker starts, once, and only while vLLM has none."""

import ast
import inspect
import subprocess
import sys

import pytest
from vllm_d2f.patches.p02_cpu_start import needed
from vllm_d2f.patches.p03_cpu_kernels import HOOK, KERNELS, LAUNCHED, METHODS, NAME
from vllm_d2f.patches.p03_cpu_kernels import p03_cpu_kernels as PATCH
from vllm_d2f.patches.patch import find, function_of, source_hash

# In a process of its own: registering changes vLLM's modules for good.
IN_A_WORKER = """
import sys
from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride
from vllm_d2f.patches import p03_cpu_kernels as p03
from vllm_d2f.patches.patch import find, function_of

p03.p03_cpu_kernels.install()
p03.p03_cpu_kernels.install()
assert "vllm.v1.worker.gpu.input_batch" not in sys.modules, "too early"
stock = {target: find(p03.NAME, target)[2] for target in p03.KERNELS}
first = {}
for _ in range(2):
    current_platform.register_triton_kernel_overrides()
    for target in p03.KERNELS:
        override = find(p03.NAME, target)[2]
        assert isinstance(override, KernelOverride), target
        assert override.func is p03.replacement(target), target
        assert first.setdefault(target, override) is override, "registered twice"
    for target in p03.METHODS:
        method = find(p03.NAME, target)[2]
        assert method is p03.replacement(target), target
        assert function_of(method) is not method, "the original is lost"
# vLLM's own overrides, for the V1 runner, are there as before.
from vllm.v1.sample import rejection_sampler
assert isinstance(rejection_sampler.expand_kernel, KernelOverride)
# A launch through vLLM's own function.
import torch
from vllm.v1.worker.gpu.input_batch import expand_idx_mapping
rows, places = expand_idx_mapping(torch.tensor([4, 2]), 3, torch.tensor([0, 1, 3]), 2)
assert rows.tolist() == [4, 2, 2] and places.tolist() == [0, 0, 1]
print("fine")
"""


def cpu_only() -> None:
    if not needed():
        pytest.skip("Triton has a CPU backend, or this is not a CPU")


def test_registration_in_a_worker():
    cpu_only()
    run = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER], capture_output=True, text=True, timeout=600
    )
    assert run.stdout.strip().endswith("fine"), run.stderr[-3000:]
    assert "was written against another version" not in run.stderr


WRITTEN_AGAINST = {**PATCH.written_against, **KERNELS, **METHODS, **LAUNCHED}


@pytest.mark.parametrize("target", WRITTEN_AGAINST)
def test_it_was_written_against_this_vllm(target: str):
    module, _, name = target.partition(":")
    if "." in name:
        found = source_hash(find(NAME, target)[2])
    else:  # a kernel: from the file, as the attribute may be an override by now
        found = source_hash(original_kernel(module, name))
    assert found == WRITTEN_AGAINST[target], f"read what changed in {target}"


def original_kernel(module: str, name: str) -> object:
    from vllm.triton_utils import dispatcher

    registered = dispatcher._registry.get(f"{module}.{name}")
    return registered[0] if registered else find(NAME, f"{module}:{name}")[2]


@pytest.mark.parametrize("target", KERNELS)
def test_still_needed(target: str):
    """Fails when a kernel is no Triton kernel any more, or vLLM brings its own CPU version."""
    from triton_emulator import kernel_ast

    module, _, name = target.partition(":")
    decorators = [ast.unparse(d).split("(")[0] for d in kernel_ast(module, name).decorator_list]
    assert decorators == ["triton.jit"]
    stock_hook = function_of(find(NAME, HOOK)[2])
    assert name not in inspect.getsource(stock_hook), "vLLM registers its own: delete ours"
