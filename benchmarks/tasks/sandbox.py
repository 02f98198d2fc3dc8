# SPDX-License-Identifier: Apache-2.0
"""Generated programs, run where they can do no harm, and the pass@1 metric made of that.

Each program gets a process of its own, this file with `--child`: no network, no file it may write
outside an empty folder of 1 MiB, no other processes, no environment, little memory and time.
Nothing runs unless `D2F_ALLOW_CODE_EXECUTION=1` is set, which `benchmarks.evaluate` does for
`--allow-code-execution`. A sandbox of one process is no virtual machine: do not run programs in it
that somebody wrote to break out.
"""

import contextlib
import ctypes
import os
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALLOW = "D2F_ALLOW_CODE_EXECUTION"
CPU_SECONDS = 10
# Far above the CPU time, so that a right program does not fail on a busy machine.
WALL_SECONDS = 60.0
MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a program: `passed` only if it ran to its end; `reason` is for people."""

    passed: bool
    reason: str


class SandboxError(RuntimeError):
    """Programs may not be run here, or cannot be run safely."""


def run_program(
    code: str,
    *,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory: int = MEMORY,
) -> Outcome:
    """Run a program in the sandbox. Raise SandboxError if this machine cannot confine it."""
    # A program that merely exits has not passed: only its end is followed by this word.
    word = secrets.token_hex(16)
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="d2f-sandbox-") as folder, open(reader) as said:
        os.chmod(folder, 0o755)
        limits = (str(cpu_seconds), str(memory), str(writer))
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", __file__, "--child", folder, *limits],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={}, cwd=folder, pass_fds=(writer,), start_new_session=True,
        )  # fmt: skip
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
    """Raise an error before hours of generation if programs cannot be run here."""
    if os.environ.get(ALLOW) != "1":
        raise SandboxError(
            "this task runs programs that the model wrote. They are confined, but run only if you "
            f"say so: pass --allow-code-execution (or set {ALLOW}=1)"
        )
    outcome = run_program("import collections, math, re, typing\nassert math.sqrt(4) == 2")
    if not outcome.passed:
        raise SandboxError(f"the sandbox cannot run a right program here: {outcome.reason}")


def pass_at_1(references: Sequence[str], predictions: Sequence[Any], **_: Any) -> float:
    """Return the fraction of programs that pass their tests, as a metric of lm-eval."""
    check()
    passed = 0
    for tests, programs in zip(references, predictions, strict=True):
        code = programs if isinstance(programs, str) else programs[0]
        passed += run_program(f"{code}\n{tests}\n").passed
    return passed / len(references)


def with_prompt(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Put HumanEval's prompt, the beginning of the program, before each response."""
    return [
        [doc["prompt"] + answer for answer in answers]
        for answers, doc in zip(resps, docs, strict=True)
    ]


def as_written(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Return MBPP's responses as they are: `until` has cut them at [DONE]."""
    return [[answer.split("[DONE]")[0] for answer in answers] for answers in resps]


# In the process of the program.

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = 442, -100, 0x8000, 0x1
PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 38, 4, 8
CAPABILITIES_V3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
DISK = 1 << 20


def call(name: str, *args: object) -> None:
    """Call the C library. Raise OSError if that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def shut_in(folder: str) -> None:
    """Confine this process: no network, no other processes, one small writable folder, no
    privileges."""
    root, uid, gid = os.geteuid() == 0, os.geteuid(), os.getegid()
    kinds = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID
    call("unshare", kinds if root else kinds | CLONE_NEWUSER)
    if not root:
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")
        ):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    # Only a child is in the new process namespace, out of reach of what else the user runs.
    if (child := os.fork()) > 0:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    attributes = struct.pack("=4Q", ATTR_RDONLY, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))
    options = f"size={DISK},mode=1777".encode()
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(folder)
    kept = 0
    if root:
        # Python's own modules may lie in a home only root can read.
        kept = CAP_DAC_READ_SEARCH
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    # What the mounts needed must not stay: effective, permitted, inheritable; low and high words.
    header = struct.pack("=Ii", CAPABILITIES_V3, 0)
    call("capset", header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def limit(cpu_seconds: int, memory: int) -> None:
    # Processes are counted per user: no further one, however many there are.
    limits = dict(CPU=cpu_seconds, AS=memory, FSIZE=DISK, NOFILE=64, CORE=0, NPROC=0)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def child() -> None:
    """Confine this process, then run the program from standard input.

    Exit status 97: it could not be shut in, and the program was not run.
    """
    folder, cpu_seconds, memory, door = sys.argv[2], *map(int, sys.argv[3:])
    word, _, code = sys.stdin.read().partition("\n")
    sys.stdin.close()
    try:
        shut_in(folder)
        limit(cpu_seconds, memory)
    except OSError as error:
        print(
            f"this machine lets no process be shut in ({error}); user namespaces may be switched "
            "off: sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_"
            "unprivileged_userns, or your container's seccomp profile",
            file=sys.stderr,
        )
        sys.exit(97)
    sys.argv[:] = ["program"]
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
    os.write(door, word.encode())


if __name__ == "__main__" and sys.argv[1:2] == ["--child"]:
    child()
