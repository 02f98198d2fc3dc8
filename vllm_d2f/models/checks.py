# SPDX-License-Identifier: Apache-2.0
"""Checks of values read from a config.json.

A checkpoint is input from strangers: sizes are bounded before anything is allocated or looped
over, and every message names the field at fault.
"""

import math
from typing import Any

# Generous beside the largest published models, small enough that a wrong number cannot exhaust
# the machine before the first weight is read (the rotary cache alone is positions x head size).
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HIDDEN = 1 << 16
MAX_INTERMEDIATE = 1 << 20
MAX_VOCAB = 1 << 22
MAX_POSITIONS = 1 << 20
MAX_END_TOKENS = 64


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` if it is an integer in [low, high]; booleans are not integers here."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"config.json: {name} must be an integer from {low} to {high}, got {value!r:.80}"
        )
    return value


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Return `value` if it is a finite number in (low, high]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not low < value <= high
    ):
        raise ValueError(
            f"config.json: {name} must be a number above {low:g} and at most {high:g}, "
            f"got {value!r:.80}"
        )
    return float(value)


def check_equal(name: str, value: Any, expected: Any, why: str) -> None:
    """Refuse a `value` other than `expected`: this stack does not implement it."""
    if type(value) is not type(expected) or value != expected:
        raise ValueError(
            f"config.json: {name} = {value!r:.80} is not supported ({why}); expected {expected!r}"
        )


def check_token_id(name: str, value: Any, vocab_size: int) -> None:
    """A token id must index the vocabulary; null and, for the end, a short list are allowed."""
    if value is None:
        return
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_END_TOKENS:
        raise ValueError(f"config.json: {name} lists more than {MAX_END_TOKENS} tokens")
    for item in values:
        check_int(name, item, 0, vocab_size - 1)
