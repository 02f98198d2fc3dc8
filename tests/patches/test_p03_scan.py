# SPDX-License-Identifier: Apache-2.0
"""vLLM's scan for kernels survives a process that has loaded Numba, and still finds kernels."""

import sys
import types

import pytest
from vllm_d2f.patches import p03_cpu_kernels
from vllm_d2f.patches.patch import find, function_of

numba = pytest.importorskip("numba", reason="vLLM's CPU build brings Numba")


def test_upstream_still_needs_it():
    """Fails when vLLM's own scan no longer trips over llvmlite: then drop `_rebind_kernels`."""
    with pytest.raises(AttributeError):
        function_of(find("test", p03_cpu_kernels.SCAN)[2])([(object(), None)])


def test_scan_rebinds_and_gives_the_modules_back():
    original = function_of(find("test", p03_cpu_kernels.SCAN)[2])
    kernel, stand_in = object(), object()
    module = types.ModuleType("holder_of_a_kernel")
    module.kernel = kernel
    before = {name for name in sys.modules if name.startswith("llvmlite")}
    assert before
    sys.modules[module.__name__] = module
    try:
        p03_cpu_kernels.p03_cpu_kernels.wrap(p03_cpu_kernels.SCAN, original)([(kernel, stand_in)])
    finally:
        del sys.modules[module.__name__]
    assert module.kernel is stand_in
    assert {name for name in sys.modules if name.startswith("llvmlite")} == before
