# SPDX-License-Identifier: Apache-2.0
"""Run by `sandbox.py`: shut this process in, then run the program from standard input.

Exit status 97 means that it could not be shut in; the program was not run then.
"""

import ctypes
import os
import resource
import struct
import sys

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = 442, -100, 0x8000, 0x1
PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 38, 4, 8
CAPABILITIES_V3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
DISK = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def shut_in(folder: str) -> None:
    """No network, no other processes, read-only but for a small empty folder, no privileges."""
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
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, DISK),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        # Processes are counted per user: no further one, however many there are.
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (value, value))


def main() -> None:
    folder, cpu_seconds, memory, door = sys.argv[1], *map(int, sys.argv[2:])
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


if __name__ == "__main__":
    main()
