# SPDX-License-Identifier: Apache-2.0
"""Runs of the authors' own code on tiny random weights (tests/data).

They decode one block at a time. SDAR, LLaDA2.0 and Stable-DiffCoder (transformers 4.57.6, mask
logit -1e9, its attention mask in float32) decode a block that holds an end token to its end;
`generate` of Fast-dLLM v2 (transformers 4.53.3, mask logit -1e9) stops before that.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_d2f.d2f import D2FParams

DATA = Path(__file__).parent / "data"
END = 198


def next_below(tau: float) -> float:
    """Return the float32 number before `tau`, so that every greater one is at least `tau`."""
    return float(np.nextafter(np.float32(tau), np.float32(0)))


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
    """Return the runs of "sdar", "llada2", "fast_dllm_v2" or "stable_diffcoder"."""
    runs = []
    for run in json.loads((DATA / family / "runs.json").read_text()):
        size, length = run["block_size"], len(run["prompt"])
        if family == "fast_dllm_v2":
            answer, sub_block = tuple(run["answer"]), run["sub_block_size"]
            params = D2FParams(size, 2, 1.0, tau_conf=run["tau_conf"], sub_block_size=sub_block)
            # Its prefill gives a token where the prompt ends with a block. The last forward commits
            # the last block and gives one token more, unless there is an end token.
            forwards = run["forwards"] - run["prefill_forwards"] * (length % size > 0)
            runs.append(Run(tuple(run["prompt"]), params, answer, len(answer), forwards))
            continue
        if family == "stable_diffcoder":
            # Without a threshold it takes one position per step. It counts no prefill, and commits
            # every block but one with an end token.
            answer, tau = tuple(run["answer"]), run["threshold"]
            tau = 1.0 if tau is None else next_below(tau)
            params = D2FParams(size, 1, tau_conf=tau, cut_last_block=1)
            forwards = run["forwards"] - (END not in answer)
            goal = -(-(length + len(answer)) // size) * size - length
            goal = min(goal, run["gen_length"])
            runs.append(Run(tuple(run["prompt"]), params, answer, goal, forwards))
            continue
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
