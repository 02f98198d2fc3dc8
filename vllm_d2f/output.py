# SPDX-License-Identifier: Apache-2.0
"""The places that commands write to. A command replaces only what this package wrote."""

import errno
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Rust's libraries quote the system, and torch has words of its own for a failed write.
_FULL_WORDS = (*map(os.strerror, _FULL), "unexpected pos")


class OutputError(ValueError):
    """A command cannot write where it was told to; the message says what to do."""


def check_output(
    path: Path, mark: str = "", text: str = "vllm-d2f", beside: Iterable[Path] = ()
) -> None:
    """Refuse a file that cannot be written, and a place with what this package did not write.

    A command calls this before it begins its work, for the file or folder that it will write.

    Args:
        mark: for a folder, which is made with its parents, the file in it by which it is known.
        text: what the mark, or the file, has in it if this package wrote it.
        beside: files that are written with `path`, and are this package's if `path` is.

    Raises:
        OutputError: with what to do.
    """
    parent = path.absolute().parent
    if not mark and not (parent.is_dir() and os.access(parent, os.W_OK)):
        why = "cannot be written" if parent.is_dir() else "no such folder to write into"
        raise OutputError(f"{path}: {why}; name another place")
    for place in (path, *beside):
        if os.path.lexists(place) and not _is_empty(place):
            sign = path / mark
            if not sign.is_file() or text.encode() not in sign.read_bytes():
                raise OutputError(
                    f"{place}: exists, and vllm-d2f did not write it; name another place, or move "
                    "it away"
                )


def output_file(text: str) -> Path:
    """Return the path of a file to write: a `type` of argparse.

    Raises:
        ArgumentTypeError: as `check_output`.
    """
    try:
        check_output(Path(text))
    except OutputError as error:
        raise ArgumentTypeError(str(error)) from None
    return Path(text)


def write_at_once(file: Path, text: str) -> None:
    """Write a small file in one piece: a process that is killed leaves the old one or the new."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _is_empty(place: Path) -> bool:
    """Return whether writing destroys nothing: an empty folder or file, or a device."""
    if place.is_dir():
        return not any(place.iterdir())
    return place.exists() and not (place.is_file() and place.stat().st_size)


def disk_is_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space, whichever library says so."""
    said = str(error)
    return getattr(error, "errno", None) in _FULL or any(words in said for words in _FULL_WORDS)


@contextmanager
def ends_with_its_pipe() -> Iterator[None]:
    """End the command without a traceback when the reader of its output ends, as `| head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes the rest at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
