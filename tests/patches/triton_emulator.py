# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own Triton kernels, program by program, without Triton.

The source of a kernel is read from the installed vLLM and compiled against the small `Language`
below, so a stand-in is compared with the kernel it stands in for, not with a copy of it that could
go stale. Slow and strict: an access outside a tensor raises.

With `TRITON_INTERPRET=1` and the `triton` package the kernels run in Triton's own interpreter
instead, which is how this emulator is checked (`test_triton_interpreter.py`).
"""

import ast
import copy
import functools
import importlib.util
import itertools
import os
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Loaded(np.ndarray):
    """What `tl.load` gives: an array that also has Triton's `to`."""

    def to(self, dtype: Any) -> "Loaded":
        return self.astype(dtype).view(Loaded)


class Pointer:
    """A place, or an array of places, in a flat buffer."""

    def __init__(self, buffer: np.ndarray, offset: Any = 0):
        self.buffer = buffer
        self.offset = offset

    def __add__(self, distance: Any) -> "Pointer":
        return Pointer(self.buffer, self.offset + np.asarray(distance))

    def __sub__(self, distance: Any) -> "Pointer":
        return Pointer(self.buffer, self.offset - np.asarray(distance))

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        offset, keep = np.broadcast_arrays(self.offset, True if mask is None else mask)
        inside = offset[keep]
        if inside.size and not (inside.min() >= 0 and inside.max() < len(self.buffer)):
            raise IndexError(f"access to {inside} of a buffer of {len(self.buffer)}")
        return offset, keep


class Language:
    """The part of `triton.language` these kernels use."""

    constexpr = object()
    int32, int64 = np.int32, np.int64
    arange, where, range = staticmethod(np.arange), staticmethod(np.where), range

    def __init__(self, grid: tuple[int, ...]):
        self.grid = grid
        self.program: tuple[int, ...] = ()

    def program_id(self, axis: int) -> int:
        return self.program[axis]

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Loaded:
        offset, keep = pointer.places(mask)
        values = np.full(offset.shape, other, dtype=pointer.buffer.dtype)
        values[keep] = pointer.buffer[offset[keep]]
        return values.view(Loaded)

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        offset, keep = pointer.places(mask)
        pointer.buffer[offset[keep]] = np.broadcast_to(value, offset.shape)[keep]


@functools.cache
def kernel_ast(module: str, name: str) -> ast.FunctionDef:
    """Return the definition of a kernel in the installed vLLM."""
    package = importlib.util.find_spec("vllm")  # a submodule's spec would import its parents
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"{module} has no function {name}")


@functools.cache
def compiled(target: str) -> tuple[types.FunctionType, frozenset[str]]:
    """Return the kernel `module:name` as a plain function without globals, and its parameters."""
    module, _, name = target.partition(":")
    node = copy.deepcopy(kernel_ast(module, name))
    node.decorator_list = []
    namespace: dict[str, Any] = {"tl": Language(())}  # for the annotations
    exec(compile(ast.Module([node], []), f"<{target}>", "exec"), namespace)
    return namespace[name], frozenset(argument.arg for argument in node.args.args)


@functools.cache
def interpreted(target: str) -> Any:
    """Return the kernel in Triton's interpreter. Triton wants its source in a file."""
    module, _, name = target.partition(":")
    definitions = [kernel_ast(module, name)]
    if "_load_ptr" in ast.unparse(definitions[0]):
        definitions.insert(0, kernel_ast("vllm.v1.worker.gpu.buffer_utils", "_load_ptr"))
    source = "import triton\nimport triton.language as tl\n\n\n"
    source += "\n\n\n".join(map(ast.unparse, definitions)) + "\n"
    path = Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return vars(kernels)[name]


def addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a table of addresses as vLLM passes it."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def launch(target: str, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run the kernel `module:name` once for every program of `grid`.

    Tensors must be contiguous. A table of addresses is given as a list of tensors.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        args = tuple(addresses(a) if isinstance(a, list) else a for a in args)
        interpreted(target)[grid](*args, **options)
        return
    kernel, parameters = compiled(target)
    language = Language(grid)
    function = types.FunctionType(
        kernel.__code__,
        {"tl": language, "_load_ptr": lambda pointer, _: pointer.pick()},
        argdefs=kernel.__defaults__,
    )
    # Options of the launch itself, `num_warps` for one, are not parameters.
    options = {key: value for key, value in options.items() if key in parameters}
    pointers = [as_pointer(argument) for argument in args]
    for language.program in itertools.product(*map(range, grid)):
        function(*pointers, **options)


class Addresses:
    """A tensor of addresses: `_load_ptr(addresses + i)` is the `i`-th tensor."""

    def __init__(self, tensors: list[torch.Tensor], index: int = 0):
        self.tensors, self.index = tensors, index

    def __add__(self, distance: int) -> "Addresses":
        return Addresses(self.tensors, self.index + int(distance))

    def pick(self) -> Pointer:
        return as_pointer(self.tensors[self.index])


def as_pointer(argument: Any) -> Any:
    """Return what a kernel receives for a launch argument."""
    if isinstance(argument, torch.Tensor):
        return Pointer(argument.view(-1).numpy())
    if isinstance(argument, list):
        return Addresses(argument)
    return argument
