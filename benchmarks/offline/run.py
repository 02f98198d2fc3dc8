# SPDX-License-Identifier: Apache-2.0
"""Run the experiments that need a GPU, in processes with a time limit; call again to continue.

    python -m benchmarks.offline.run --out results --minutes 6     # a stretch; the same again
    python -m benchmarks.offline.run --rehearse                    # on a CPU with tiny shapes

The most valuable experiment comes first. Each writes its points as they are measured, and what is
finished is skipped. Exit code: 0 all is measured, 75 time was up and the same command continues, 1
an experiment could not be finished (see run.log).
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.record import TIME_IS_UP, Parser

ROOT = Path(__file__).resolve().parents[2]
LOG = "run.log"
LEAST_S = 20.0
"""With fewer seconds left, no process is started."""
FRUITLESS = 2
"""An experiment is given up after this many processes in a row without a new point."""


@dataclass(frozen=True, slots=True)
class Step:
    """An experiment with its options."""

    name: str  # of its result, OUT/NAME.json
    command: str  # module and options on a GPU
    seconds: float  # most that one of its processes may take
    rehearsal: str = "--rehearse"  # what is added on a CPU


CASES = "--requests 1 8 64 --blocks 4 1 2 --contexts 512 --rates 2.9"
EDGES = "--requests 1 8 --blocks 4 --contexts 512 --what steps"


def engine_args(**options: Any) -> str:
    """Return an option of a command: JSON without spaces, which `format` and `split` keep whole."""
    text = json.dumps(options, separators=(",", ":"))
    return "--engine-args " + text.replace("{", "{{").replace("}", "}}")


# The tiny model needs little, and others may use the device.
LITTLE = {"gpu_memory_utilization": 0.3}
GRAPHS = {**LITTLE, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}
# FlashInfer has no float32, and no heads as small as those of d2f-tiny.
FLOAT32 = "parity --prompts 16 --ways batch single --attention-backend TRITON_ATTN"
WIDE = "parity --prompts 40 --ways batch --head-size 128 --dtype float16 --attention-backend CUSTOM"
BFLOAT16 = "parity --prompts 40 --ways batch --dtype bfloat16"
ON_CPU = "--quick --dtype float32 --attention-backend="
FEW = "--contexts 512 2048 --requests 1 16 --blocks 1 4"
STEPS = (
    Step("kernels", "kernels --rows 32", 180),
    Step("parity", f"{FLOAT32} {engine_args(**LITTLE)}", 90, "--quick --attention-backend="),
    Step("steps", f"steps --shapes dream qwen {CASES}", 240),
    Step("parity_full", f"{WIDE} {engine_args(**GRAPHS)}", 180, f"{ON_CPU} --engine-args {{}}"),
    Step(
        "parity_async",
        f"{WIDE} {engine_args(**GRAPHS, async_scheduling=True)}",
        180,
        f'{ON_CPU} --engine-args {{"async_scheduling":true}}',
    ),
    Step("parity_bfloat16", f"{BFLOAT16} {engine_args(**LITTLE)}", 90, "--quick --dtype float32"),
    Step("steps_piecewise", f"steps --shapes dream --variant piecewise {EDGES}", 150),
    Step("steps_async", f"steps --shapes dream --variant async {EDGES}", 150),
    Step("attention", f"attention --layer dream {FEW}", 120),
    Step("latency", "latency --steps {out}/steps.json", 60, ""),
)
MORE = (
    Step("steps_llada", "steps --shapes llada llama", 460),
    Step("attention_llada", "attention --layer llada --requests 1 4 16 64", 460),
)
"""Steps that run only if they are named."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How steps are run: for `seconds` in all, results to `out` and copies to `copy_to`."""

    out: Path
    seconds: float
    rehearse: bool = False
    copy_to: Path | None = None

    def words(self, step: Step, seconds: float) -> list[str]:
        """Run a step in its own process, which begins no point in the last quarter of its life."""
        given = step.command.format(out=self.out).split()
        given += step.rehearsal.split() if self.rehearse else []
        words = [sys.executable, "-m", f"benchmarks.{given[0]}", *given[1:]]
        minutes = f"{0.75 * seconds / 60:.2f}"
        return [*words, "--json", str(self.out / f"{step.name}.json"), "--minutes", minutes]

    def result(self, step: Step) -> dict[str, Any]:
        """Return the report of a step, empty if there is none."""
        path = self.out / f"{step.name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def finished(self, step: Step) -> bool:
        """Return whether every point of a step was measured, was skipped or failed."""
        return bool(found := self.result(step)) and "left_for_a_later_run" not in found

    def progress(self, step: Step) -> int:
        """Return a number that grows with every point and every attempt at one."""
        path = self.out / f"{step.name}.jsonl"
        return path.stat().st_size if path.exists() else 0

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} == {text}"
        print(line, flush=True)
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def copy(self) -> None:
        """Copy the results so far to where they are collected, in case of an interruption."""
        if self.copy_to is not None:
            self.copy_to.mkdir(parents=True, exist_ok=True)
            for file in self.out.iterdir():
                if file.is_file():
                    shutil.copy2(file, self.copy_to / file.name)


def run(plan: Plan, steps: Sequence[Step]) -> int:
    """Run steps in order until all are finished or the time is up. Return an exit code."""
    deadline = time.monotonic() + plan.seconds
    plan.out.mkdir(parents=True, exist_ok=True)
    left: list[str] = []
    for step in steps:
        fruitless = 0
        while not plan.finished(step):
            seconds = min(step.seconds, deadline - time.monotonic())
            if seconds < min(LEAST_S, plan.seconds):
                plan.say(f"time is up before {step.name}: run the same command again")
                return TIME_IS_UP
            before = plan.progress(step)
            code = process(plan, step.name, plan.words(step, seconds), seconds)
            plan.copy()
            fruitless = 0 if plan.progress(step) > before else fruitless + 1
            if fruitless >= FRUITLESS and not plan.finished(step):
                plan.say(f"{step.name} left unfinished: exit code {code}, nothing new")
                left.append(step.name)
                break
    plan.say(f"not finished: {', '.join(left)}" if left else "all is measured")
    plan.copy()
    return int(bool(left))


def process(plan: Plan, name: str, words: Sequence[str], seconds: float) -> int:
    """Run one process with a limit. Its output goes to the log; its children end with it."""
    plan.say(f"{name}: at most {seconds:.0f} s")
    began = time.monotonic()
    with (plan.out / LOG).open("ab") as log:
        how: dict[str, Any] = dict(
            stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        child = subprocess.Popen(words, cwd=ROOT, start_new_session=True, **how)
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
            plan.say(f"{name}: killed after {seconds:.0f} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    plan.say(f"{name}: exit code {code} after {time.monotonic() - began:.0f} s")
    return code


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("offline.run", __doc__)
    known = {step.name: step for step in (*STEPS, *MORE)}
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(known)}")
    add("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    add("--minutes", type=float, default=1e4, help="end then; the next call continues")
    add("--copy-to", type=Path, help="copy the results here after every process")
    add("--rehearse", action="store_true", help="tiny shapes on a CPU: does it run at all?")
    add("--retry", action="store_true", help="measure steps with failed points again")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.steps if name not in known]:
        parser.error(f"no step {unknown[0]!r}; there are {', '.join(known)}")
    args.steps = [known[name] for name in args.steps] or list(STEPS)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # A caller's time limit must also end the process of a step; `process` does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("error: torch finds no CUDA device; --rehearse runs on a CPU", file=sys.stderr)
            return 2
    plan = Plan(args.out.resolve(), 60 * args.minutes, args.rehearse, args.copy_to)
    for step in args.steps:
        if args.retry and plan.result(step).get("failed"):
            (plan.out / f"{step.name}.json").unlink()
    return run(plan, args.steps)


if __name__ == "__main__":
    sys.exit(main())
