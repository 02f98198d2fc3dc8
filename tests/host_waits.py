# SPDX-License-Identifier: Apache-2.0
"""Finds, on a CPU, what would make the host wait for a device.

On a CPU nothing waits, so this looks for the operations themselves: those whose result has a size
that only the device knows, those that bring a value to Python, and assignments of a Python number
to one row, which copy it from the host (`fill_` does not). On CUDA use
`torch.cuda.set_sync_debug_mode("error")`, which asks the driver.
"""

import sys
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class HostWait(AssertionError):
    """The host would wait for the device here."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.partition(".")[0] in OPERATIONS or name in OPERATIONS:
            known = (kwargs or {}).get("output_size") is not None
            if not (known and "repeat_interleave" in name):
                raise HostWait(name)
        if name.partition(".")[0] in INDEXED:
            kinds = [x.dtype for x in args[1] if x is not None]
            if torch.bool in kinds or torch.uint8 in kinds:
                raise HostWait(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_waits(allowed=()):
    """Raise `HostWait` at the first such operation; modules in `allowed` read host tensors."""

    def watch(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller not in allowed and not caller.startswith("torch."):
                raise HostWait(f"Tensor.{name} in {caller}")
            return original(self, *args, **kwargs)

        return original, method

    def assign(self, index, value):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # An H200 waited for `x[3] = 1.0`, and not for `x[:, 3] = 1.0`.
        number = isinstance(value, bool | int | float)
        if number and isinstance(index, int) and caller not in allowed:
            raise HostWait(f"a number assigned to a row in {caller}")
        return setitem(self, index, value)

    setitem = torch.Tensor.__setitem__
    watched = {name: watch(name) for name in METHODS} | {"__setitem__": (setitem, assign)}
    for name, (_, method) in watched.items():
        setattr(torch.Tensor, name, method)
    try:
        with _Operations():
            yield
    finally:
        for name, (original, _) in watched.items():
            setattr(torch.Tensor, name, original)
