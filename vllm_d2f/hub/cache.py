# SPDX-License-Identifier: Apache-2.0
"""The folders of merged models. A folder appears in its place complete, or not at all.

A merge writes to `NAME.part-<pid>` beside the place and renames that folder at the end. The record
in a folder lists its files with their sizes and sha256. A folder is served only if its record is
there and every listed file has its size.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vllm_d2f.hub import HubError, say
from vllm_d2f.hub.checkpoint import read_json
from vllm_d2f.output import check_output, disk_is_full

RECORD = "d2f_merge.json"
FORMAT = 1
"""Version of the record. A folder of another version has to be merged again."""

MARK = ".d2f-unfinished"
"""A file in every folder that is being filled or deleted: no other folder is taken for one."""

_PART = re.compile(r".+\.part-\d+")


@dataclass(frozen=True, slots=True)
class State:
    """What is in a model's place.

    Attributes:
        kind: "ready", "absent" or "damaged".
        size: bytes on the disk.
        reason: what is wrong with a damaged folder.
        record: the record of a ready folder.
    """

    kind: str
    size: int = 0
    reason: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def root() -> Path:
    """Return the folder `D2F_CACHE`, else `vllm-d2f` in huggingface_hub's `HF_HOME`."""
    from huggingface_hub.constants import HF_HOME

    own = os.environ.get("D2F_CACHE")
    return Path(own).expanduser() if own else Path(HF_HOME) / "vllm-d2f"


def folder_of(name: str) -> Path:
    """Return the place of the model called `name`."""
    return root() / name


def is_part(folder: Path) -> bool:
    """Return whether the folder has the name of one that a merge has not completed."""
    return _PART.fullmatch(folder.name) is not None


def is_unfinished(folder: Path) -> bool:
    """Return whether a killed process of ours has left this folder."""
    if not is_part(folder) or folder.is_symlink() or not folder.is_dir():
        return False
    there = {path.name for path in folder.iterdir()}
    return not there or MARK in there or RECORD in there


def inspect(folder: Path) -> State:
    """Compare a folder with its record: names and sizes of its files, not their content."""
    if not os.path.lexists(folder):
        return State("absent")
    size = size_of(folder)
    try:
        return State("ready", size, record=_checked_record(folder))
    except HubError as error:
        return State("damaged", size, str(error))


def _checked_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder that agrees with it.

    Raises:
        HubError: with what is wrong with the folder.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder")
    if not (folder / RECORD).exists():
        raise HubError(f"{RECORD} is missing: not written by vllm-d2f, or not completely")
    try:
        record = read_json(folder / RECORD)
        sizes = {str(name): int(file["size"]) for name, file in record["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HubError(f"{RECORD} is not readable ({error})") from None
    if record.get("format") != FORMAT:
        raise HubError("another version of vllm-d2f merged it")
    if "config.json" not in sizes:
        raise HubError(f"{RECORD} lists no config.json")
    for name, size in sizes.items():
        file = folder / name
        if name != os.path.basename(name) or not file.is_file() or file.is_symlink():
            raise HubError(f"{name} is missing")
        if file.stat().st_size != size:
            raise HubError(f"{name} has {file.stat().st_size} bytes of {size}")
    return record


def damaged_files(folder: Path, state: State) -> list[str]:
    """Return the files of a ready folder whose content has changed. This reads every byte."""
    files = state.record["files"].items()
    return [name for name, file in files if sha256_of(folder / name) != file.get("sha256")]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def elsewhere(folder: Path) -> str:
    """Return the remedy where `folder` cannot hold a model; the environment moves only a cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if any(folder.is_relative_to(cache) for cache in (root(), Path(HF_HUB_CACHE).resolve())):
        return "set HF_HOME or D2F_CACHE to a folder of yours, on a disk with space"
    return "name another --out"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a place: one process prepares it, others wait.

    The lock is a file beside the place. The system releases it when its process ends.
    """
    path = folder.with_name(f".{folder.name}.d2f-lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        while not _lock(file, folder):
            file.close()
            file = path.open("a")
    except OSError as error:
        why = f"{folder.parent}: cannot be written ({error}); {elsewhere(folder.parent)}"
        raise HubError(why) from None
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: IO[str], folder: Path) -> bool:
    """Wait for the lock; False if the process that held it has deleted the file meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"waiting for another process that prepares {folder}")
        fcntl.flock(file, fcntl.LOCK_EX)
    return os.fstat(file.fileno()).st_nlink > 0


def write_whole(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Let `write` fill a folder beside `folder`, then put it in its place, replacing what is there.

    The caller holds the lock of `folder`. If anything fails, the place keeps what it had.

    Args:
        write: fills the folder it is given and returns the record, with "files" complete.

    Raises:
        HubError: the disk is full, or not writable.
    """
    remove_parts(folder)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    made = False
    try:
        part.mkdir(parents=True)
        made = True
        (part / MARK).touch()
        record = write(part) | {"format": FORMAT}
        record["files"].pop(MARK, None)
        write_json(part / RECORD, record)
        (part / MARK).unlink()
        # All files are on the disk before the folder gets its name.
        for path in (*part.iterdir(), part):
            sync(path)
        remove_folder(folder)
        os.rename(part, folder)
        sync(folder.parent)
    except OSError as error:
        if disk_is_full(error):
            raise HubError(
                f"{folder}: the disk filled up while it was written; nothing was kept. Free some "
                f"space, or {elsewhere(folder.parent)}, and run it again"
            ) from None
        raise HubError(f"{folder}: cannot be written ({error}); nothing was kept") from error
    finally:
        if made and part.is_dir():
            _delete(part)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Rename a folder, if there is one, and delete it: its place never holds a half-deleted one.

    Raises:
        OutputError: it has no record, so this package did not write it.
    """
    check_output(folder, RECORD, text="")
    if not os.path.lexists(folder):
        return
    gone = folder.with_name(f"{folder.name}.part-{os.getpid()}0")
    os.rename(folder, gone)
    if gone.is_dir() and not gone.is_symlink():
        _delete(gone)
    else:
        gone.unlink()


def _delete(folder: Path) -> None:
    """Delete a folder of ours and what shows that it is ours last."""
    with contextlib.suppress(OSError):
        (folder / MARK).touch()
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def remove_parts(folder: Path) -> int:
    """Delete what killed processes left of `folder`; return the bytes freed.

    The caller holds the lock of `folder`.
    """
    parts = parts_of(folder)
    freed = sum(map(size_of, parts))
    for part in parts:
        _delete(part)
    return freed


def parts_of(folder: Path) -> list[Path]:
    """Return the unfinished folders beside `folder`."""
    prefix = f"{folder.name}.part-"
    return [p for p in folder.parent.glob("*") if p.name.startswith(prefix) and is_unfinished(p)]


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
