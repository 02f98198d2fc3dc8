# SPDX-License-Identifier: Apache-2.0
"""From measured batches to the figures of a point, and ratios paired run by run."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.engine import Answer, Batch

UNITS = {
    "useful_tokens_per_s": "tokens up to and including the end token, per second of wall time",
    "useful_tokens_per_cpu_s": "the same per second of CPU time of the decoder's process",
    "raw_tokens_per_s": "all decided tokens, those behind the end token too, per second",
    "requests_per_s": "answers per second",
    "tokens_per_forward": "useful tokens per forward the request took part in",
    "computed_per_committed": "positions run through the model after the prompt, per useful token",
    "time_to_first_token_ms": "from handing in the batch to the request's first tokens",
    "time_per_token_ms": "from handing in the batch to the request's last token, per useful token",
    "step_ms": "wall time per engine step (forward), everything included",
    "peak_mib": "peak resident memory of the decoder's process (on a GPU: of the device)",
    "score": "share of answers that end by themselves with the right number",
    "simulated_tokens_per_forward": "null: the models decided; a number: so many positions were "
    "accepted per forward whatever the model said, and scores mean nothing",
    "exact": "share of answers that are the expected text to the letter, null without such a text",
    "ratio": "paired: of two measurements in the same run; median, lowest and highest run",
}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    values = list(values)
    return {
        "median": _round(statistics.median(values)),
        "min": _round(min(values)),
        "max": _round(max(values)),
    }


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """The 50th and 99th percentile (nearest rank)."""
    ordered = sorted(values)

    def rank(percent: int) -> float:
        return _round(ordered[math.ceil(percent / 100 * len(ordered)) - 1])

    return {"p50": rank(50), "p99": rank(99)}


def answers(runs: "Iterable[Sequence[Batch]]") -> "list[Answer]":
    return [answer for run in runs for batch in run for answer in batch.answers]


def rate(run: "Sequence[Batch]", field: str = "useful", per: str = "seconds") -> float:
    """Tokens of a run per second of `per` ("seconds" or "cpu_s")."""
    tokens = sum(getattr(answer, field) for answer in answers([run]))
    return tokens / max(sum(getattr(batch, per) for batch in run), 1e-9)


def point(runs: "Sequence[Sequence[Batch]]", has_text: bool) -> dict[str, Any]:
    """The figures of one decoder at one batch size. `has_text`: whole answers are expected."""
    all_answers = answers(runs)
    useful = sum(a.useful for a in all_answers)
    return {
        "runs": len(runs),
        "answers_per_run": len(answers(runs[:1])),
        "useful_tokens_per_s": spread(rate(run) for run in runs),
        "useful_tokens_per_cpu_s": spread(rate(run, per="cpu_s") for run in runs),
        "raw_tokens_per_s": spread(rate(run, "raw") for run in runs),
        "requests_per_s": spread(
            len(answers([run])) / sum(batch.seconds for batch in run) for run in runs
        ),
        "tokens_per_forward": _round(useful / sum(a.forwards for a in all_answers)),
        "computed_per_committed": _round(sum(a.computed for a in all_answers) / useful),
        "time_to_first_token_ms": percentiles(1e3 * a.first_s for a in all_answers),
        "time_per_token_ms": percentiles(1e3 * a.last_s / a.useful for a in all_answers),
        "step_ms": spread(
            1e3 * sum(b.seconds for b in run) / sum(b.steps for b in run) for run in runs
        ),
        "peak_mib": round(max(batch.peak_mib for run in runs for batch in run)),
        "score": _round(sum(a.final for a in all_answers) / len(all_answers)),
        "exact": _round(sum(a.exact for a in all_answers) / len(all_answers)) if has_text else None,
        "problems": len({a.item for a in all_answers}),
    }


def paired(
    mine: "Sequence[Sequence[Batch]]", other: "Sequence[Sequence[Batch]]"
) -> dict[str, float]:
    """How many times the useful tokens per second of `other`, run by run."""
    return spread(rate(a) / rate(b) for a, b in zip(mine, other, strict=True))


def paired_per_answer(
    mine: "Sequence[Sequence[Batch]]", other: "Sequence[Sequence[Batch]]"
) -> dict[str, dict[str, float]]:
    """Against a decoder that answered some of the problems, one at a time: on those problems only.

    `answers` compares seconds per answer, `tokens` useful tokens per second. They differ where one
    of the two ends its answers early, that is, wrong.
    """
    per_answer, per_token = [], []
    for run, theirs in zip(mine, other, strict=True):
        asked = {a.item for a in answers([theirs])}
        same = [batch for batch in run if {a.item for a in batch.answers} <= asked]
        per_answer.append(_seconds_per_answer(theirs) / _seconds_per_answer(same))
        per_token.append(rate(same) / rate(theirs))
    return {"answers": spread(per_answer), "tokens": spread(per_token)}


def _seconds_per_answer(run: "Sequence[Batch]") -> float:
    return sum(batch.seconds for batch in run) / len(answers([run]))


def _round(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
