# SPDX-License-Identifier: Apache-2.0
"""Intervals of scores, by drawing answers with replacement.

A score is a sum over answers of what is right (or wrong) divided by a sum of what there is. Where
several trainings answered the same questions, their answers stand one after another, and the
trainings are drawn with replacement too.
"""

import random
from collections.abc import Sequence

Counts = Sequence[tuple[float, float]]
"""Of each answer: how much is right, and out of how much."""

DRAWS = 1000


def interval(counts: Counts, seed: int = 0, runs: int = 1) -> tuple[float, float, float]:
    """Return a score, and its 2.5th and 97.5th percentile.

    Args:
        runs: trainings whose answers to the same questions stand one after another.
    """
    draws = _draws([counts], seed, runs)
    return _score(counts), *_ends([of[0] for of in draws])


def difference(
    ours: Counts, theirs: Counts, seed: int = 0, runs: int = 1
) -> tuple[float, float, float]:
    """Return our score minus theirs on the same questions, and the interval of the difference."""
    found = [mine - other for mine, other in _draws([ours, theirs], seed, runs)]
    return _score(ours) - _score(theirs), *_ends(found)


def _score(counts: Counts) -> float:
    return sum(top for top, _ in counts) / sum(whole for _, whole in counts)


def _draws(sets: Sequence[Counts], seed: int, runs: int) -> list[list[float]]:
    """Return the scores of each set on the same draws of questions and trainings."""
    rng = random.Random(seed)
    count = len(sets[0]) // runs
    found = []
    for _ in range(DRAWS):
        drawn = rng.choices(range(count), k=count)
        if runs > 1:
            chosen = rng.choices(range(runs), k=runs)
            drawn = [run * count + at for run in chosen for at in drawn]
        found.append([_score([one[i] for i in drawn]) for one in sets])
    return found


def _ends(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))]
