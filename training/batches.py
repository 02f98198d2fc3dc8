# SPDX-License-Identifier: Apache-2.0
"""Batches of tokenised problems. A batch holds one number of steps only, so nothing is padded.

Batch number `i` depends on the seed and on `i` alone: a resumed training sees the same data as one
that was never interrupted, and there is no data state to save.

Shapes: B problems, T tokens.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.arithmetic import Problem, make


@dataclass(frozen=True)
class Batch:
    """Prompts, answers and the end tokens behind them.

    Attributes:
        ids_BT: int64.
        prompt_len: tokens of every prompt.
        answer_len: tokens of every answer with its end token; what follows is the tail.
    """

    ids_BT: Tensor
    prompt_len: int
    answer_len: int


def encode(problems: list[Problem], tokenizer: PreTrainedTokenizerFast, answer_room: int) -> Batch:
    """Problems of equal length; end tokens fill `answer_room` positions behind the prompt."""
    prompts = tokenizer([problem.question for problem in problems]).input_ids
    answers = tokenizer([problem.answer for problem in problems]).input_ids
    if len({(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)}) != 1:
        raise ValueError("problems of one batch differ in length; give them one number of steps")
    room = max(answer_room, len(answers[0]) + 1)
    end = [tokenizer.eos_token_id] * (room - len(answers[0]))
    rows = [p + a + end for p, a in zip(prompts, answers, strict=True)]
    return Batch(torch.tensor(rows), len(prompts[0]), len(answers[0]) + 1)


def whole_blocks(length: int, block_size: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // block_size) * block_size


def training_batch(
    index: int,
    seed: int,
    size: int,
    step_counts: tuple[int, ...],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int | None,
) -> Batch:
    """Batch number `index`. With a block size the tail reaches to the end of a block.

    Decoding opens a block before it knows that the answer has ended, so some batches carry one or
    two blocks of end tokens more.
    """
    rng = random.Random(f"{seed}:{index}")
    n_steps = rng.choice(step_counts)
    problems = [make(rng, n_steps, "train") for _ in range(size)]
    if block_size is None:
        return encode(problems, tokenizer, 0)
    extra = rng.choices((0, 1, 2), (0.65, 0.25, 0.10))[0]
    # Two tokens for the start, six a step, and the end token.
    room = whole_blocks(2 + 6 * n_steps + 1, block_size) + extra * block_size
    return encode(problems, tokenizer, room)
