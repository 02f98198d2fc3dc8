# SPDX-License-Identifier: Apache-2.0
"""Models by name: download a base and a D2F adapter, merge them, and keep the result."""

import re
import sys

__all__ = ["HubError", "human", "own_name", "say"]


class HubError(ValueError):
    """A model cannot be prepared; the message says why and what to do."""


def say(message: str) -> None:
    """Tell the user what takes time, on stderr."""
    print(f"vllm-d2f: {message}", file=sys.stderr, flush=True)


def human(size: int) -> str:
    """Return a size in bytes, in the unit that fits."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= divisor:
            return f"{size / divisor:.1f} {unit}"
    return f"{size} B"


def own_name(name: str) -> str:
    """Return the last part of a path or Hub id, or the repository in a path of the Hub's cache."""
    cached = re.search(r"models--([^/\\]+)", name)
    return (cached[1] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()
