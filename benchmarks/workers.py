# SPDX-License-Identifier: Apache-2.0
"""Decoders in processes of their own, asked one at a time.

vLLM holds one engine per process here, and a decoder that waits in its process costs nothing. So
all of them stay loaded, and the parent asks them in turn: what is compared was measured moments
apart on the same machine.
"""

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.engine import Batch, StepCost

START_S = 900.0
"""Longest a decoder may take to load; compilation is part of it."""


class WorkerError(RuntimeError):
    """A decoder failed; the message has its traceback."""


def prepare_process() -> None:
    """Environment for the workers, before they import torch. The user's own comes first."""
    # Step times are read inside the engine, so it has to run in the worker itself.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # With more threads than idle cores every operator waits for the scheduler.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class Worker:
    """A decoder in its own process. Starts at once; the first question waits until it is loaded."""

    def __init__(self, kind: str, **arguments: Any) -> None:
        """`kind`: "engine" or "vanilla", with the arguments of `Engine` or `Vanilla`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, kind, arguments))
        self._process.start()
        child.close()
        self._ready = False
        self.simulated: float | None = None
        """Tokens per forward of a simulated acceptance, known once it is loaded."""

    def wait(self) -> None:
        """Return when the decoder is loaded.

        Raises:
            WorkerError: it could not be.
        """
        if not self._ready:
            if not self._pipe.poll(START_S):
                raise WorkerError(f"not loaded after {START_S:.0f} s")
            self.simulated = self._receive()
            self._ready = True

    def measure(self, *arguments: Any) -> "list[Batch]":
        """See `Engine.measure` and `Vanilla.measure`."""
        return self._call("measure", *arguments)

    def steps(self, *arguments: Any) -> "list[StepCost]":
        """See `Engine.steps`."""
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
            raise WorkerError(f"ended by itself, exit code {self._process.exitcode}") from None
        if not good:
            raise WorkerError(value)
        return value


def most_modes() -> list[str]:
    """Modes of vLLM worth a decoder each: both on a CPU, on a GPU only vLLM's default."""
    return ["compiled"] if on_gpu() else ["eager", "compiled"]


def device_share(decoders: int, options: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments with which so many decoders fit on one GPU; the user's own come first."""
    if not on_gpu() or {"gpu_memory_utilization", "kv_cache_memory_bytes"} & options.keys():
        return options
    return {"gpu_memory_utilization": round(0.9 / decoders, 3), **options}


def on_gpu() -> bool:
    """Whether vLLM will run on a GPU, asked without starting CUDA in this process."""
    import torch

    return torch.cuda.device_count() > 0


def close_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.close()


def _serve(pipe: Connection, kind: str, arguments: dict[str, Any]) -> None:
    """The worker's process: load, then answer until the parent closes the pipe or is gone."""
    try:
        decoder = _load(kind, arguments)
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
        # What vLLM leaves running must not keep the process.
        os._exit(0)


def _load(kind: str, arguments: dict[str, Any]) -> Any:
    if kind == "vanilla":
        from benchmarks.vanilla import Vanilla

        return Vanilla(**arguments)
    from benchmarks.engine import Engine

    return Engine(**arguments)
