# SPDX-License-Identifier: Apache-2.0
"""Shared by the parity tests: requests that cover the settings, and the comparison."""

import functools
import random
from pathlib import Path

from benchmarks.parity import GRID, TIE, Case, differences, reference_answers

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MAX_LEN = 320
WINDOW = 256


def random_prompts(count, seed, vocab=200, longest=60):
    rng = random.Random(seed)
    # Mask (198) and end token (199) stand in prompts like any other token.
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def check(cases, expected, got, decisive=0.8):
    """Check for equal tokens and forwards wherever rounding cannot have decided."""
    wrong = [item for item in differences(cases, expected, got) if not item["tie"]]
    assert not wrong, f"{len(wrong)} of {len(cases)} differ; the first: {wrong[0]}"
    clear = sum(known.margin >= TIE for known in expected)
    assert clear >= decisive * len(cases), "too many ties for this to be a test"


def grid_cases():
    """Make one prompt for each of the 48 settings: blocks 4 to 32, windows of 1 to 8 blocks."""
    prompts = random_prompts(len(GRID), seed=1)
    return [Case(tuple(p), s, 48) for p, s in zip(prompts, GRID, strict=True)]


@functools.cache
def grid_answers(model):
    """Return the reference's answers to `grid_cases`, which several modules share (15 s)."""
    return reference_answers(model, grid_cases(), MAX_LEN)
