# SPDX-License-Identifier: Apache-2.0
"""Generated programs, run where they can do no harm, and the pass@1 metric made of that.

Each program gets a process of its own (`sandbox_child.py`): no network, no file it may write
outside an empty folder of 1 MiB, no other processes, no environment, little memory and time.
Nothing runs unless `D2F_ALLOW_CODE_EXECUTION=1` is set, which `benchmarks.evaluate` does for
`--allow-code-execution`. A sandbox of one process is no virtual machine: do not run programs in it
that somebody wrote to break out.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOW = "D2F_ALLOW_CODE_EXECUTION"
CHILD = Path(__file__).with_name("sandbox_child.py")
CPU_SECONDS = 10
# Far above the CPU time: on a busy machine a right program must not fail for want of a turn.
WALL_SECONDS = 60.0
MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """`passed` only if the program ran to its very end; `reason` is for people."""

    passed: bool
    reason: str


class SandboxError(RuntimeError):
    """Programs may not be run, or cannot be run safely here."""


def run_program(
    code: str,
    *,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory: int = MEMORY,
) -> Outcome:
    """Run a program in the sandbox.

    Raises:
        SandboxError: this machine cannot confine it; it was not run.
    """
    # A program that merely exits has not passed: only its end is followed by this word.
    word = secrets.token_hex(16)
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="d2f-sandbox-") as folder, open(reader) as said:
        os.chmod(folder, 0o755)
        limits = (str(cpu_seconds), str(memory), str(writer))
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD), folder, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            cwd=folder,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        timed_out = False
        try:
            _, errors = process.communicate(f"{word}\n{code}".encode(), timeout=wall_seconds)
        except subprocess.TimeoutExpired:
            timed_out, errors = True, b""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        told = "" if timed_out else said.read(64)
    if timed_out:
        return Outcome(False, f"no end within {wall_seconds} s")
    if process.returncode == 128 + signal.SIGKILL:
        return Outcome(False, f"no end within {cpu_seconds} s of CPU time")
    text = errors.decode(errors="replace")
    if process.returncode == 97:
        raise SandboxError(f"{text.strip()}; generated code was not run")
    if told == word:
        return Outcome(True, "passed")
    last = text.strip().splitlines()[-1] if text.strip() else f"exit status {process.returncode}"
    return Outcome(False, last[:200])


def check() -> None:
    """Fail early, before hours of generation, where programs could not be run.

    Raises:
        SandboxError: not allowed, or this machine cannot confine them.
    """
    if os.environ.get(ALLOW) != "1":
        raise SandboxError(
            "this task runs programs that the model wrote. They are confined, but run only if you "
            f"say so: pass --allow-code-execution (or set {ALLOW}=1)"
        )
    outcome = run_program("import collections, math, re, typing\nassert math.sqrt(4) == 2")
    if not outcome.passed:
        raise SandboxError(f"the sandbox cannot run a right program here: {outcome.reason}")


def pass_at_1(references: Sequence[str], predictions: Sequence[Any], **_: Any) -> float:
    """For lm-eval: the fraction of programs that pass the tests behind them."""
    check()
    passed = 0
    for tests, programs in zip(references, predictions, strict=True):
        code = programs if isinstance(programs, str) else programs[0]
        passed += run_program(f"{code}\n{tests}\n").passed
    return passed / len(references)


def with_prompt(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """HumanEval: the prompt is the beginning of the program."""
    return [
        [doc["prompt"] + answer for answer in answers]
        for answers, doc in zip(resps, docs, strict=True)
    ]


def as_written(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """MBPP: the program up to [DONE], which `until` cuts."""
    return [[answer.split("[DONE]")[0] for answer in answers] for answers in resps]
