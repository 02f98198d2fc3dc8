# SPDX-License-Identifier: Apache-2.0
"""Models by name: download a base and a D2F adapter, merge them, and keep the result."""

import sys

__all__ = ["HubError", "human", "say"]


class HubError(ValueError):
    """A model cannot be prepared; the message says why and what to do."""


def say(message: str) -> None:
    """Tell the user what takes time, on stderr."""
    print(f"vllm-d2f: {message}", file=sys.stderr, flush=True)


def human(size: int) -> str:
    """A size in bytes, in the unit that fits."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= divisor:
            return f"{size / divisor:.1f} {unit}"
    return f"{size} B"
