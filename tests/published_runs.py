# SPDX-License-Identifier: Apache-2.0
"""Runs of the authors' own code of SDAR and LLaDA2.0 on tiny random weights (tests/data).

They decode one block at a time. A block that holds an end token is decoded to its end.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from vllm_d2f.d2f import D2FParams

DATA = Path(__file__).parent / "data"
END = 198


@dataclass(frozen=True)
class Run:
    """One request.

    Attributes:
        answer: up to and with its first end token.
        goal: answer positions up to the end of its last block.
        forwards: of that goal, counted as this package counts: the prompt runs with the first
            forward, and a block commits beside the next one, the last one not at all. None where
            that cannot be compared.
    """

    prompt: tuple[int, ...]
    params: D2FParams
    answer: tuple[int, ...]
    goal: int
    forwards: int | None


def published_runs(family: str) -> list[Run]:
    """The runs of "sdar" or "llada2"."""
    runs = []
    for run in json.loads((DATA / family / "runs.json").read_text()):
        size, length = run["block_size"], len(run["prompt"])
        answer = run["answer"]
        answer = answer[: answer.index(END) + 1] if END in answer else answer
        blocks = -(-(length + len(answer)) // size) - length // size
        static = run.get("rule") == "low_confidence_static"
        params = D2FParams(
            size,
            max_blocks=1,
            tau_conf=1.0 if static else run["tau_conf"],
            min_per_step=size // run["denoising_steps"],
        )
        if family == "sdar":  # counts a prefill and the commit of every block
            forwards = run["forwards"] - run["prefill_forwards"] - 1
        else:  # has no cache, so it commits nothing
            forwards = run["forwards"] + blocks - 1
            if run["gen_length"] < run["denoising_steps"]:
                # It spreads the block over `gen_length` steps then, some of them larger: a schedule
                # that min_per_step cannot express. There are two such runs.
                forwards = None
        goal = (length // size + blocks) * size - length
        runs.append(Run(tuple(run["prompt"]), params, tuple(answer), goal, forwards))
    return runs
