# SPDX-License-Identifier: Apache-2.0
"""Run all stages, each part in a process of bounded life; call again to go on.

    python -m benchmarks.gpu.run --out results        # about an hour in all, in pieces
    python -m benchmarks.gpu.run --out results --minutes 9 --copy-to folder

Finished parts are skipped, and so are points that are settled. Exit code: 0 all parts are finished,
75 time was up and the same command goes on, 1 a part could not be finished (see run.log).
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.stage import DONE, LIMIT_S, MORE, STAGES, Stage
from benchmarks.gpu.store import Mismatch, read

ROOT = Path(__file__).resolve().parents[2]
LOG = "run.log"
MAX_FILES, MAX_BYTES = 8, 16 << 20
MAX_LOG = 8 << 20
LEAST_S = 60.0
"""With less than this left no process is started."""
FRUITLESS = 2
"""Processes in a row that may end without settling a point before their part is left."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How parts are run.

    Attributes:
        seconds: for all of them; limit: for one process.
        grace: share of the limit after which no further point begins.
    """

    out: Path
    work: Path
    seconds: float
    limit: float = LIMIT_S
    grace: float = 0.75
    quick: bool = False
    rehearse: bool = False
    copy_to: Path | None = None

    def command(self, stage: Stage, part: str, seconds: float) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.gpu.part", stage.name, part]
        words += ["--out", str(self.out), "--work", str(self.work), "--seconds", f"{seconds:.0f}"]
        words += ["--quick"] * self.quick + ["--rehearse"] * self.rehearse
        return words


Command = Callable[[Stage, str, float], list[str]]


def run(plan: Plan, stages: Sequence[tuple[Stage, str]], command: Command | None = None) -> int:
    """Run parts in order until all are finished or time is up.

    Args:
        command: what runs a part, for tests.
    """
    command = command or plan.command
    deadline = time.monotonic() + plan.seconds
    left: list[str] = []
    for stage, part in stages:
        name = f"{stage.name}/{part}"
        fruitless = 0
        while not finished(plan.out, stage, part):
            seconds = min(plan.limit, deadline - time.monotonic())
            if seconds < min(LEAST_S, plan.seconds):
                say(plan.out, f"time is up before {name}: run the same command again")
                copy(plan)
                return MORE
            before = settled(plan.out, stage)
            code = run_part(plan, name, command(stage, part, plan.grace * seconds), seconds)
            copy(plan)
            if finished(plan.out, stage, part):
                break
            fruitless = 0 if settled(plan.out, stage) > before else fruitless + 1
            if code != MORE and fruitless >= FRUITLESS:
                say(plan.out, f"{name} left unfinished: exit code {code}, nothing new")
                left.append(name)
                break
    for problem in too_large(plan.out):
        say(plan.out, problem)
    copy(plan)
    if left:
        say(plan.out, "not finished: " + ", ".join(left))
        return 1
    say(plan.out, "all parts are finished")
    return DONE


def run_part(plan: Plan, name: str, words: list[str], seconds: float) -> int:
    """One process with a limit; its output goes to the log."""
    say(plan.out, f"{name}: at most {seconds:.0f} s")
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (plan.out / LOG).open("ab") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
            say(plan.out, f"{name}: killed after {seconds:.0f} s")
        finally:
            # Its own session: whatever it started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    say(plan.out, f"{name}: exit code {code} after {time.monotonic() - began:.0f} s")
    trim(plan.out / LOG)
    return code


def finished(out: Path, stage: Stage, part: str) -> bool:
    path = out / f"{stage.name}.json"
    return path.exists() and part in read(path)["finished"]


def settled(out: Path, stage: Stage) -> int:
    """Something that grows with every point and every attempt of one."""
    path = out / f"{stage.name}.json"
    if not path.exists():
        return 0
    data = read(path)
    done = sum(len(data[kind]) for kind in ("points", "skipped", "failed"))
    return 10 * done + sum(data["attempts"].values())


def say(out: Path, text: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} == {text}"
    print(line, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def trim(log: Path) -> None:
    """Keep the end of a log that has grown too large."""
    if (size := log.stat().st_size) > MAX_LOG:
        with log.open("rb") as file:
            file.seek(size - MAX_LOG // 2)
            tail = file.read()
        log.write_bytes(b"(beginning cut off)\n" + tail)


def copy(plan: Plan) -> None:
    """Results so far to where they are collected, should this command be cut off."""
    if plan.copy_to is not None:
        plan.copy_to.mkdir(parents=True, exist_ok=True)
        for file in plan.out.iterdir():
            if file.is_file():
                shutil.copy2(file, plan.copy_to / file.name)


def too_large(out: Path) -> list[str]:
    """What would not fit into the way back."""
    files = [file for file in out.iterdir() if file.is_file()]
    problems = [
        f"{file.name} has {file.stat().st_size >> 20} MiB, more than {MAX_BYTES >> 20}"
        for file in files
        if file.stat().st_size > MAX_BYTES
    ]
    if len(files) > MAX_FILES:
        problems.append(f"{len(files)} files in the folder of results, more than {MAX_FILES}")
    return problems


def select(names: Sequence[str]) -> list[tuple[Stage, str]]:
    """Stages or parts ("steps", "d", "steps/dream"), all of them by default.

    Raises:
        ValueError: no such stage or part.
    """
    every = [(stage, part) for stage in STAGES for part in stage.parts]
    if not names:
        return every
    chosen = []
    for name in names:
        found = [
            (stage, part)
            for stage, part in every
            if name in (stage.letter, stage.name, f"{stage.name}/{part}")
        ]
        if not found:
            known = ", ".join(f"{s.name} ({s.letter}: {', '.join(s.parts)})" for s in STAGES)
            raise ValueError(f"no stage {name!r}; there are {known}")
        chosen += found
    return chosen


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("stages", nargs="*", help="some of them, such as steps, d or steps/dream (default: all)")
    add("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    add("--work", type=Path, default=Path("build/gpu-work"), help="folder of what stays here")
    add("--minutes", type=float, default=1e4, help="end after so many; the next call goes on")
    add("--copy-to", type=Path, help="copy the results here after every part")
    add("--quick", action="store_true", help="few points, minutes in all")
    add("--rehearse", action="store_true", help="tiny shapes on a CPU: does it run at all?")
    add("--retry", action="store_true", help="take up points that failed")
    args = parser.parse_args(argv)
    try:
        args.stages = select(args.stages)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # A caller's time limit must end the part's process as well, which `run_part` sees to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            print(
                "error: torch finds no CUDA device; --rehearse runs everything on a CPU with tiny "
                "shapes",
                file=sys.stderr,
            )
            return 2
    out = args.out.resolve()
    try:
        if args.retry:
            from benchmarks.gpu.store import Store

            for stage in {stage.name for stage, _ in args.stages}:
                if (path := out / f"{stage}.json").exists():
                    Store(path, stage, {}).retry_failed()
        plan = Plan(
            out,
            args.work.resolve(),
            60 * args.minutes,
            quick=args.quick,
            rehearse=args.rehearse,
            copy_to=args.copy_to,
        )
        return run(plan, args.stages)
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
