# SPDX-License-Identifier: Apache-2.0
"""Jobs of the real language models: how prompts are asked and answers are scored.

A score is a sum over answers of what is right (or wrong) divided by a sum of what there is, so that
an interval comes from drawing answers with replacement.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, itemgetter
from pathlib import Path
from typing import Any

from benchmarks.harness.record import UsageError
from benchmarks.harness.workload import Item, final_number, load_items
from training import extract, restore

Counts = Callable[[str, str], tuple[float, float]]
"""Counts of a right and a found text: how much is right, and out of how much."""


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        score: its name.
        counts: what counts for it.
        errors: whether that is what is wrong.
        figures: other scores of all answers.
        same: whether two answers say the same.
        unseen: whether a right answer belongs to the questions that are scored apart as well,
            since training has not seen what they ask for.
        schema: what requests for JSON ask for.
    """

    score: str
    counts: Counts
    errors: bool = False
    figures: Callable[[Sequence[tuple[str, str]]], dict[str, float]] = lambda pairs: {}
    same: Callable[[str, str], bool] = eq
    unseen: Callable[[str], bool] | None = None
    schema: Mapping[str, Any] | None = None


def _exact(right: str, found: str) -> tuple[float, float]:
    return float(right == found), 1.0


def _slots(right: str, found: str) -> tuple[float, float]:
    return extract.slots(right, found), 1.0


def _same_number(right: str, found: str) -> bool:
    return final_number(right) is not None and final_number(right) == final_number(found)


def _number(right: str, found: str) -> tuple[float, float]:
    return float(_same_number(right, found)), 1.0


SLOTS = {
    "type": "object",
    "properties": {key: {"type": ["string", "null"]} for key in extract.KEYS},
    "required": list(extract.KEYS),
    "additionalProperties": False,
}

JOBS = {
    "exact": Job("exact", _exact),
    "extract": Job("slots", _slots, figures=extract.scores, unseen=extract.unseen, schema=SLOTS),
    "number": Job("last_number", _number, same=_same_number),
    "restore": Job(
        "word_error_rate",
        lambda *pair: restore.word_errors([pair]),
        errors=True,
        figures=restore.scores,
    ),
}


def load_job(data: str | None, count: int, seed: int, tokenizer: Any) -> list[Item]:
    """Return `count` records of a JSONL file with "prompt" and "response", as chat prompts.

    GSM8K's "question" and "answer" will do. Records are drawn with the seed, for a file may be in
    an order. Without a file: generated problems, asked as they are.

    Raises:
        UsageError: the file cannot be read, or holds too few records.
    """
    if data is None:
        return load_items(count, None, seed)
    try:
        lines = Path(data).read_text(encoding="utf-8").splitlines()
        random.Random(seed).shuffle(lines)
        lines = lines[:count]
        found = list(map(json.loads, lines))
        ours = all("prompt" in row for row in found)
        read = itemgetter(*(("prompt", "response") if ours else ("question", "answer")))
        rows = [read(row) for row in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'--data {data}: {error!r}; JSONL with "prompt" and "response" is needed, such as '
            "`python -m training.extract` writes"
        ) from None
    if len(rows) < count:
        raise UsageError(f"--data {data}: {len(rows)} records, {count} are needed")
    return [Item(asked(tokenizer, prompt), float("nan"), right) for prompt, right in rows]


def asked(tokenizer: Any, prompt: str) -> str:
    """Return a prompt in the tokenizer's chat template, or unchanged without one."""
    if tokenizer.chat_template is None:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
