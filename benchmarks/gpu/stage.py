# SPDX-License-Identifier: Apache-2.0
"""What the stages share: their list, their command line, and the loop over a part's points.

A stage is a module with `points(part, options)`. It yields a key and a function that measures, and
nothing dear happens before such a function is called: a part whose points are all settled ends at
once. A part runs in a process of its own, which ends after a failure, because a failed kernel or
engine spoils what comes after it; `run` starts it again.
"""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.store import Mismatch, Store

DONE, FAILED, MORE = 0, 70, 75
"""Exit codes of a part: finished, a point failed, time is up."""

LIMIT_S = 460
"""Longest life of a part's process."""

Points = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


class Skip(Exception):
    """A point this machine cannot run, and why."""


class Unfinished(Exception):
    """Time was up within a point that keeps its own progress: it goes on, and is no failure."""


@dataclass(frozen=True, slots=True)
class Stage:
    """`letter` is that of the list in README.md; `module` measures, part by part."""

    letter: str
    name: str
    module: str
    parts: tuple[str, ...]


STEPS = ("dream", "qwen", "llada", "llama", "dream-full", "dream-async")

STAGES = (
    Stage("b", "kernels", "benchmarks.gpu.kernels", ("host", "backend", "confidence", "tests")),
    Stage("c", "parity", "benchmarks.gpu.parity", ("tiny", "wide")),
    Stage("d", "steps", "benchmarks.gpu.steps", STEPS),
    Stage("e", "profile", "benchmarks.gpu.profiling", ("dream", "qwen")),
    Stage("a", "attention", "benchmarks.gpu.attention", ("dream", "llada")),
    Stage("f", "training", "benchmarks.gpu.retrain", ("train", "evaluate", "pack")),
)
"""In the order in which they run: what everything else stands on comes first."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a part is run.

    Attributes:
        out: folder of results, few and small files.
        work: folder for what does not travel: checkpoints, compiled code.
        quick: few points.
        rehearse: on a CPU with tiny shapes; figures mean nothing.
        seconds: life of this process, which began at `began` of `time.monotonic`.
    """

    out: Path
    work: Path
    quick: bool = False
    rehearse: bool = False
    seconds: float = LIMIT_S
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds of this process that are left."""
        return max(1.0, self.began + self.seconds - time.monotonic())

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


def about(options: Options) -> dict[str, Any]:
    """What must agree for results to stand in one file, and what a reader needs to know."""
    import torch

    from benchmarks.workload import environment

    versions = environment(None, [], "benchmarks.gpu.run")["versions"]
    versions["torch"] = torch.__version__
    device = "CPU (rehearsal)" if options.rehearse else torch.cuda.get_device_name()
    return {
        "device": device,
        "versions": versions,
        "cuda": torch.version.cuda,
        "quick": options.quick,
        "rehearse": options.rehearse,
    }


def drive(
    store: Store, part: str, points: Points, deadline: float, one_per_process: bool = False
) -> int:
    """Measure what is not settled yet; an exit code.

    Args:
        deadline: of `time.monotonic`; no point begins after it.
        one_per_process: end after a point was measured, with MORE.
    """
    for key, measure in points:
        if store.settled(key):
            continue
        if time.monotonic() > deadline:
            return MORE
        store.begin(key)
        print(f"{time.strftime('%H:%M:%S')} {store.data['stage']} {key}", flush=True)
        try:
            value = measure()
        except Skip as reason:
            store.skip(key, str(reason))
        except Unfinished as reason:
            print(f"{key}: {reason}", flush=True)
            store.unfinished(key)
            return MORE
        except Exception as error:
            traceback.print_exc()
            store.fail(key, f"{type(error).__name__}: {str(error)[:500]}")
            return FAILED
        else:
            store.add(key, value)
            if one_per_process:
                return MORE
    store.finish(part)
    return DONE


def parse(argv: Sequence[str] | None = None) -> tuple[Stage, str, Options]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.part",
        description="Run one part of one stage; `python -m benchmarks.gpu.run` calls this.",
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("stage", choices=names)
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=LIMIT_S)
    args = parser.parse_args(argv)
    stage = STAGES[names.index(args.stage)]
    if args.part not in stage.parts:
        parser.error(f"the parts of {stage.name} are {', '.join(stage.parts)}")
    options = Options(args.out, args.work, args.quick, args.rehearse, args.seconds)
    return stage, args.part, options


def main(argv: Sequence[str] | None = None) -> int:
    stage, part, options = parse(argv)
    try:
        store = Store(options.out / f"{stage.name}.json", stage.name, about(options))
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    module = importlib.import_module(stage.module)
    points = module.points(part, options)
    single = getattr(module, "ONE_POINT_PER_PROCESS", False)
    return drive(store, part, points, options.began + options.seconds, single)
