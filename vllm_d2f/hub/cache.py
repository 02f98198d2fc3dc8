# SPDX-License-Identifier: Apache-2.0
"""Where merged models are kept. A folder appears there complete or not at all.

A folder is written beside its place as `NAME.part-<pid>` and renamed when it is complete. Its
record, written last, lists every file; a folder without one, or with a file missing or of another
size, is never served.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_d2f.hub import HubError

__all__ = ["RECORD", "State", "damaged_files", "folder_of", "inspect", "is_part", "locked", "root"]
__all__ += ["remove_folder", "remove_parts", "write_whole"]

RECORD = "d2f_merge.json"
FORMAT = 1
"""Version of the record. A folder of another version has to be merged again."""

_PART = re.compile(r".+\.part-\d+")
_MAX_RECORD = 1 << 20


@dataclass(frozen=True, slots=True)
class State:
    """What is in a model's place.

    Attributes:
        kind: "ready", "absent" or "damaged".
        size: bytes on the disk.
        reason: what is wrong with a damaged one.
        record: the completion record, of a ready one.
    """

    kind: str
    size: int = 0
    reason: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def root() -> Path:
    """`D2F_CACHE`, else `vllm-d2f` in `HF_HOME` as huggingface_hub defines it."""
    if own := os.environ.get("D2F_CACHE"):
        return Path(own).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(hub))) / "vllm-d2f"


def folder_of(name: str) -> Path:
    """The place of the model called `name`."""
    return root() / name


def is_part(folder: Path) -> bool:
    """Whether the folder was never completed."""
    return _PART.fullmatch(folder.name) is not None


def inspect(folder: Path) -> State:
    """Compare a folder with its record: names and sizes, which takes no time."""
    if not folder.is_dir():
        if os.path.lexists(folder):
            return State("damaged", reason=f"{folder} is not a folder")
        return State("absent")
    size = size_of(folder)
    path = folder / RECORD
    try:
        if path.stat().st_size > _MAX_RECORD:
            raise ValueError("too large")
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {
            str(name): (int(f["size"]), str(f["sha256"])) for name, f in record["files"].items()
        }
    except FileNotFoundError:
        return State("damaged", size, f"{RECORD} is missing: not written by vllm-d2f, or not whole")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return State("damaged", size, f"{RECORD} is not readable ({error})")
    if record.get("format") != FORMAT:
        return State("damaged", size, "it was merged by another version of vllm-d2f")
    if "config.json" not in files:
        return State("damaged", size, f"{RECORD} lists no config.json")
    for name, (expected, _) in files.items():
        file = folder / name
        if name != os.path.basename(name) or not file.is_file() or file.is_symlink():
            return State("damaged", size, f"{name} is missing")
        if file.stat().st_size != expected:
            return State("damaged", size, f"{name} has {file.stat().st_size} bytes of {expected}")
    return State("ready", size, record=record)


def damaged_files(folder: Path, state: State) -> list[str]:
    """Files of a ready folder whose content is not what was written. Reads everything."""
    return [
        name
        for name, file in state.record["files"].items()
        if sha256_of(folder / name) != file["sha256"]
    ]


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, announce: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of a place: one process prepares it, others wait. It ends with its process."""
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            announce(f"waiting for another process that prepares {folder}")
            lock.acquire()
    except OSError as error:
        raise HubError(
            f"{folder.parent}: cannot be written ({error}). Set D2F_CACHE to a folder of yours"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_whole(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Let `write` fill a folder beside `folder`, then put it in its place, replacing what is there.

    The caller holds the lock of `folder`. Whatever goes wrong, the place keeps what it had.

    Args:
        write: fills the folder it is given and returns the record, with "files" complete.

    Raises:
        HubError: the disk is full, or not writable.
    """
    remove_parts(folder)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        record = write(part)
        write_json(part / RECORD, record | {"format": FORMAT})
        _sync_folder(part)
        if os.path.lexists(folder):
            remove_folder(folder)
        os.rename(part, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise HubError(
                f"{folder}: the disk filled up while it was written; nothing was kept. Free some "
                "space, or set D2F_CACHE to a folder on another disk, and run it again"
            ) from None
        raise HubError(f"{folder}: cannot be written ({error}); nothing was kept") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, and wait until it is on the disk."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, and wait until it is on the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove_folder(folder: Path) -> None:
    """Rename a folder, then delete it, so that no part of it stands in its place at any moment."""
    gone = folder.with_name(f"{folder.name}.part-{os.getpid()}0")
    os.rename(folder, gone)
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink()


def remove_parts(folder: Path) -> int:
    """Delete what killed processes left of `folder`. The caller holds its lock.

    Returns:
        The bytes freed.
    """
    freed = 0
    for path in parts_of(folder):
        freed += size_of(path)
        shutil.rmtree(path, ignore_errors=True)
    return freed


def parts_of(folder: Path) -> list[Path]:
    """Unfinished folders beside `folder`."""
    if not folder.parent.is_dir():
        return []
    prefix = f"{folder.name}.part-"
    found = (path for path in folder.parent.iterdir() if path.name.startswith(prefix))
    return sorted(path for path in found if is_part(path))


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
