# SPDX-License-Identifier: Apache-2.0
"""Exact match of the three kinds of model, and tokens per forward.

Exact match asks for the whole worked answer and its end token; final match for the last number.

Shapes: B problems, T tokens, A positions behind the prompt, V vocabulary, M masked positions.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.arithmetic import Problem, final_of
from training.batches import Batch, encode
from training.model import TinyQwen2, attention_bias


@dataclass(frozen=True)
class Score:
    """Figures over `problems` problems; tokens are counted up to the end token, it included."""

    problems: int
    exact: float
    final: float
    tokens_per_forward: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def causal_bias(T: int) -> Tensor:
    return attention_bias(torch.ones(1, T, T, dtype=torch.bool).tril())


def grouped(problems: list[Problem]) -> list[list[Problem]]:
    """By number of steps."""
    counts = sorted({len(problem.steps) for problem in problems})
    return [[p for p in problems if len(p.steps) == count] for count in counts]


def score(
    problems: list[Problem],
    outputs: list[list[int]],
    forwards: list[int],
    tokenizer: PreTrainedTokenizerFast,
) -> Score:
    """Compare outputs (token ids up to the end token, it included where there is one)."""
    end = tokenizer.eos_token_id
    exact = final = 0
    for problem, ids in zip(problems, outputs, strict=True):
        ended = bool(ids) and ids[-1] == end
        text = str(tokenizer.decode(ids[:-1] if ended else ids))
        exact += ended and text == problem.answer
        final += ended and final_of(text) == problem.final
    tokens = sum(len(ids) for ids in outputs)
    return Score(
        len(problems), exact / len(problems), final / len(problems), tokens / sum(forwards)
    )


def up_to_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


@torch.inference_mode()
def autoregressive(
    model: TinyQwen2, problems: list[Problem], tokenizer: PreTrainedTokenizerFast, room: int = 64
) -> Score:
    """Greedy, one token per forward."""
    outputs, order = [], []
    for group in grouped(problems):
        batch = encode(group, tokenizer, 0)
        ids_BT = batch.ids_BT[:, : batch.prompt_len]
        ended_B = torch.zeros(len(group), dtype=torch.bool)
        for _ in range(room):
            hidden_BTC = model.hidden(ids_BT, causal_bias(ids_BT.shape[1]))
            next_B = model.lm_head(hidden_BTC[:, -1]).argmax(-1)
            ids_BT = torch.cat((ids_BT, next_B[:, None]), 1)
            ended_B |= next_B == tokenizer.eos_token_id
            if ended_B.all():
                break
        rows = ids_BT[:, batch.prompt_len :].tolist()
        outputs += [up_to_end(row, tokenizer.eos_token_id) for row in rows]
        order += group
    return score(order, outputs, [len(ids) for ids in outputs], tokenizer)


@torch.inference_mode()
def teacher_forced(
    model: TinyQwen2, problems: list[Problem], tokenizer: PreTrainedTokenizerFast
) -> float:
    """Exact match of greedy autoregressive decoding, from one forward over the true answers."""
    right = 0
    for group in grouped(problems):
        batch = encode(group, tokenizer, 0)
        logits_BTV = model(batch.ids_BT, causal_bias(batch.ids_BT.shape[1]))
        same_BT = logits_BTV[:, :-1].argmax(-1) == batch.ids_BT[:, 1:]
        right += int(same_BT[:, batch.prompt_len - 1 :].all(1).sum())
    return right / len(problems)


def _masked(batch: Batch, mask_id: int) -> Tensor:
    ids_BT = batch.ids_BT.clone()
    ids_BT[:, batch.prompt_len :] = mask_id
    return ids_BT


@torch.inference_mode()
def one_token_per_step(
    model: TinyQwen2,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerFast,
    room: int = 48,
) -> Score:
    """The bidirectional teacher: every forward decides the most confident masked position."""
    outputs, order, forwards = [], [], []
    for group in grouped(problems):
        batch = encode(group, tokenizer, room)
        ids_BT = _masked(batch, tokenizer.mask_token_id)
        open_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        open_BT[:, batch.prompt_len :] = True
        bias_1TT = torch.zeros(1, ids_BT.shape[1], ids_BT.shape[1])
        rows_B = torch.arange(len(group))
        for _ in range(room):
            logits_BAV = model.lm_head(model.hidden(ids_BT, bias_1TT)[:, batch.prompt_len - 1 : -1])
            logits_BAV[..., tokenizer.mask_token_id] = float("-inf")
            sure_BA, token_BA = logits_BAV.float().softmax(-1).max(-1)
            best_B = sure_BA.where(open_BT[:, batch.prompt_len :], -1.0).argmax(1)
            ids_BT[rows_B, batch.prompt_len + best_B] = token_BA[rows_B, best_B]
            open_BT[rows_B, batch.prompt_len + best_B] = False
        outputs += [
            up_to_end(row, tokenizer.eos_token_id) for row in ids_BT[:, batch.prompt_len :].tolist()
        ]
        order += group
        forwards += [room] * len(group)
    return score(order, outputs, forwards, tokenizer)
