# SPDX-License-Identifier: Apache-2.0
"""Decoders in processes of their own, asked one at a time.

vLLM holds one engine per process here, and a decoder that waits in its process costs nothing. So
all of them stay loaded, and the parent asks them in turn: what is compared was measured moments
apart on the same machine.
"""

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from benchmarks.harness.record import Failure, on_gpu
from vllm_d2f.demo import ENVIRONMENT

if TYPE_CHECKING:
    from benchmarks.harness.engine import Batch, StepCost
    from benchmarks.harness.workload import Item

START_S = 900.0
"""The longest that a decoder may take to load, compilation included."""


@dataclass(frozen=True)
class Decoder:
    """A row of an experiment's table of decoders."""

    name: str
    model: str  # folder or Hub id
    mode: str = "compiled"  # or "eager", of vLLM; "vanilla": the teacher in plain transformers
    options: Mapping[str, Any] = field(default_factory=dict)  # more arguments of vLLM's engine


class WorkerError(Failure):
    """A decoder failed; the message has its traceback."""


def prepare_process() -> None:
    """Set the environment of the workers before they import torch. The user's own comes first."""
    # Step times are read inside the engine, so it has to run in the worker itself.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    quiet = dict(PYTHONWARNINGS="ignore", HF_HUB_DISABLE_PROGRESS_BARS="1")
    for name, value in {**ENVIRONMENT, **quiet}.items():
        os.environ.setdefault(name, value)


class Worker:
    """A decoder in its own process. Starts at once; the first question waits until it is loaded."""

    def __init__(self, vanilla: bool, **arguments: Any) -> None:
        """Start it, with the arguments of `Vanilla` or of `Engine`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, vanilla, arguments))
        self._process.start()
        child.close()
        self._ready = False
        self.simulated: float | None = None
        """Tokens per forward of a simulated acceptance, known once it is loaded."""

    def wait(self) -> None:
        """Wait until the decoder is loaded. Raise WorkerError if loading fails."""
        if not self._ready:
            if not self._pipe.poll(START_S):
                raise WorkerError(f"a decoder was not loaded after {START_S:.0f} s")
            self.simulated = self._receive()
            self._ready = True

    def measure(self, *arguments: Any) -> "list[Batch]":
        """Call `Engine.measure` or `Vanilla.measure`."""
        return self._call("measure", *arguments)

    def arrive(self, *arguments: Any) -> "list[Batch]":
        """Call `Engine.arrive`."""
        return self._call("arrive", *arguments)

    def warm_up(self, items: "Sequence[Item]", sizes: Sequence[int]) -> None:
        """Answer a few items: the first ones pay for memory and code that nothing has touched."""
        for size in sizes:
            self.measure(items[: max(size, 2)], size)

    def steps(self, *arguments: Any) -> "list[StepCost]":
        """Call `Engine.steps`."""
        return self._call("steps", *arguments)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, method: str, *arguments: Any) -> Any:
        self.wait()
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, value = self._pipe.recv()
        except EOFError:
            self._process.join(5)
            code = self._process.exitcode
            raise WorkerError(f"a decoder ended by itself, exit code {code}") from None
        if not good:
            raise WorkerError(f"a decoder failed: {value}")
        return value


@contextmanager
def workers(
    decoders: Sequence[Decoder], max_batch: int, max_tokens: int
) -> Iterator[dict[str, Worker]]:
    """Yield all decoders of a table, loaded, by name. Their processes end with the `with` block.

    They are loaded one after another where they compile, for that takes every core, and on a GPU,
    whose free memory each of them measures.
    """
    found: dict[str, Worker] = {}
    try:
        for one in decoders:
            vanilla = one.mode == "vanilla"
            arguments: dict[str, Any] = {"model": one.model}
            if not vanilla:
                arguments |= dict(mode=one.mode, max_batch=max_batch, max_tokens=max_tokens)
                arguments["options"] = device_share(len(decoders), dict(one.options))
            found[one.name] = Worker(vanilla, **arguments)
            if one.mode == "compiled" or on_gpu():
                found[one.name].wait()
        for worker in found.values():
            worker.wait()
        yield found
    finally:
        for worker in found.values():
            worker.close()


def most_modes() -> list[str]:
    """Return the modes of vLLM to measure: both on a CPU, on a GPU only vLLM's default."""
    return ["compiled"] if on_gpu() else ["eager", "compiled"]


def device_share(decoders: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return engine arguments with which so many decoders fit on one GPU. The user's own win."""
    if not on_gpu() or {"gpu_memory_utilization", "kv_cache_memory_bytes"} & options.keys():
        return options
    return {"gpu_memory_utilization": round(0.9 / decoders, 3), **options}


def _serve(pipe: Connection, vanilla: bool, arguments: dict[str, Any]) -> None:
    """Load, then answer until the parent closes the pipe or is gone."""
    try:
        module = importlib.import_module(f"benchmarks.harness.{'vanilla' if vanilla else 'engine'}")
        decoder = (module.Vanilla if vanilla else module.Engine)(**arguments)
        pipe.send((True, decoder.simulated))
        while True:
            try:
                method, parameters = pipe.recv()
            except (EOFError, OSError):
                return
            pipe.send((True, getattr(decoder, method)(*parameters)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        # Threads and processes that vLLM leaves running must not keep this process alive.
        os._exit(0)
