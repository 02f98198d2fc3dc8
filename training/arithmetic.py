# SPDX-License-Identifier: Apache-2.0
"""Arithmetic word problems with worked answers: the data of the embedded tiny models.

A problem of two steps reads "Tom has 34 apples, buys 25 more, gives 18 away. How many apples does
Tom have?" and is answered by "34+25=59-18=41". Three properties are deliberate:

- Every number, running totals included, has two digits, and every step has as many tokens in the
  question (six) as in the answer. So the distance from a part of the answer to the words it comes
  from depends on the number of steps only.
- No number occurs twice in an answer. A total that is written again as the next operand teaches a
  bidirectional model to copy it instead of adding.
- Train, validation and test problems are told apart by a hash of the numbers, never by the draw,
  so a problem with the same numbers but other words is in the same split.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

LOWEST, HIGHEST = 10, 99
SPLITS = ("train", "validation", "test")

NAMES = {
    "he": ("Tom", "Ben", "Max", "Sam", "Leo", "Paul"),
    "she": ("Ann", "Eva", "Mia", "Kim", "Zoe", "Lucy"),
}
ITEMS = ("apples", "books", "coins", "stamps", "cards", "pens", "shells", "eggs")
START_VERBS = ("has", "owns")
QUESTION_VERBS = ("have", "own")
# Verbs of a step with the last words they go with; the item itself goes with those marked by "".
ADDING = {"buys": ("more", ""), "finds": ("more", ""), "gets": ("more", ""), "wins": ("more", "")}
TAKING = {"gives": ("away",), "throws": ("away",), "sells": ("today", ""), "loses": ("today", "")}


@dataclass(frozen=True)
class Problem:
    """One problem. `steps` holds signed operands: 25 adds, -18 takes away."""

    question: str
    answer: str
    start: int
    steps: tuple[int, ...]

    @property
    def final(self) -> int:
        return self.start + sum(self.steps)


def words() -> tuple[str, ...]:
    """Return every word of the domain. Each becomes a single token with its leading space."""
    names = tuple(name for group in NAMES.values() for name in group)
    fixed = ("How", "many", "does", "more", "away", "today")
    return (
        *names, *NAMES, *ITEMS, *START_VERBS, *QUESTION_VERBS, *ADDING, *TAKING, *fixed,
    )  # fmt: skip


def split_of(start: int, steps: tuple[int, ...]) -> str:
    """Return the split these numbers belong to: 90 % train, 5 % validation, 5 % test."""
    digest = hashlib.blake2b(f"{start}:{steps}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "little") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def worked_answer(start: int, steps: tuple[int, ...]) -> str:
    """Return the running total, e.g. "34+25=59-18=41"."""
    total, text = start, f"{start}"
    for step in steps:
        total += step
        text += f"{step:+}={total}"
    return text


def final_of(answer: str) -> int | float | None:
    """Return the number that an answer ends in, or None where it does not end in one.

    "1,200", "-3" and "0.5" are one number each; of "59-18=41" it is the part behind the sign.
    """
    last = re.search(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?$", answer.strip().rstrip("."))
    if last is None:
        return None
    plain = last[0].replace(",", "")
    return float(plain) if "." in plain else int(plain)


def _numbers(rng: random.Random, n_steps: int) -> tuple[int, tuple[int, ...]]:
    """Start and signed operands; all numbers and running totals distinct and of two digits."""
    while True:
        start = total = rng.randint(LOWEST, HIGHEST)
        seen, steps = {start}, []
        for _ in range(n_steps):
            signs = [1] * (total + LOWEST <= HIGHEST) + [-1] * (total - LOWEST >= LOWEST)
            sign = rng.choice(signs)
            operand = rng.randint(LOWEST, HIGHEST - total if sign > 0 else total - LOWEST)
            total += sign * operand
            steps.append(sign * operand)
            seen |= {operand, total}
        if len(seen) == 1 + 2 * n_steps:
            return start, tuple(steps)


def make(rng: random.Random, n_steps: int, split: str) -> Problem:
    """Draw one problem of `split` with `n_steps` steps."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; use one of {', '.join(SPLITS)}")
    start, steps = _numbers(rng, n_steps)
    while split_of(start, steps) != split:
        start, steps = _numbers(rng, n_steps)
    pronoun = rng.choice(tuple(NAMES))
    name, item = rng.choice(NAMES[pronoun]), rng.choice(ITEMS)
    text = f"{name} {rng.choice(START_VERBS)} {start} {item}"
    for step in steps:
        verb, tails = rng.choice(tuple((ADDING if step > 0 else TAKING).items()))
        text += f", {verb} {abs(step)} {rng.choice(tails) or item}"
    who = rng.choice((name, pronoun))
    text += f". How many {item} does {who} {rng.choice(QUESTION_VERBS)}?"
    return Problem(text, worked_answer(start, steps), start, steps)


def stream(
    split: str, seed: int | str, step_counts: tuple[int, ...] = (2, 3, 4, 5, 6)
) -> Iterator[Problem]:
    """Yield problems of `split` without end, the numbers of steps in turn."""
    rng = random.Random(f"{split}:{seed}")
    while True:
        for n_steps in step_counts:
            yield make(rng, n_steps, split)


def problems(
    split: str, n: int, seed: int | str, step_counts: tuple[int, ...] = (2, 3, 4, 5, 6)
) -> list[Problem]:
    """Return `n` problems of `split`, the same ones for the same seed."""
    source = stream(split, seed, step_counts)
    return [next(source) for _ in range(n)]
