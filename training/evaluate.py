# SPDX-License-Identifier: Apache-2.0
"""Decode held-out problems: autoregressive, vanilla diffusion, and D2F's reference loop.

Exact match asks for the whole answer and its end token; final match for the last number. `ends` are
the tokens that end an answer, first the one that fills what is behind it. Models are called with
tensors on the CPU.

Shapes: B problems, T tokens, A canvas positions, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from training.arithmetic import final_of
from training.attention import allowed
from training.config import DecodingSection
from training.data import Batch, Example, padded
from training.objectives import Logits
from vllm_d2f.d2f import D2FParams
from vllm_d2f.reference import generate


@dataclass(frozen=True)
class Score:
    """Figures over `problems` problems; tokens are counted up to the end token, it included."""

    problems: int
    exact: float
    final: float
    tokens_per_forward: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(
    examples: Sequence[Example],
    outputs: Sequence[Sequence[int]],
    forwards: Sequence[int],
    tokenizer,
    ends: Sequence[int],
) -> Score:
    """Score outputs: token ids up to and including an end token, if there is one."""
    exact = final = 0
    for example, ids in zip(examples, outputs, strict=True):
        text, ended = text_of(ids, tokenizer, ends)
        exact += ended and text.strip() == example.text.strip()
        final += ended and final_of(text) == final_of(example.text)
    n, tokens = len(examples), sum(map(len, outputs))
    return Score(n, exact / n, final / n, tokens / max(sum(forwards), 1))


def text_of(ids: Sequence[int], tokenizer, ends: Sequence[int]) -> tuple[str, bool]:
    """Return the text of an output, and whether it ends with an end token."""
    ended = bool(ids) and ids[-1] in ends
    return str(tokenizer.decode(ids[:-1] if ended else ids)), ended


def up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return `ids` up to and including the first end token."""
    found = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return ids[: found + 1]


def by_length(examples: Sequence[Example], most: int = 64) -> list[list[Example]]:
    """Return groups of equal prompt length."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[len(example.prompt)].append(example)
    return [g[at : at + most] for g in groups.values() for at in range(0, len(g), most)]


@torch.inference_mode()
def autoregressive(
    logits: Logits, examples: Sequence[Example], tokenizer, ends: Sequence[int], max_tokens: int
) -> Score:
    """Decode greedily, one token per forward."""
    outputs, order = [], []
    for group in by_length(examples):
        rows = [list(example.prompt) for example in group]
        ended = [False] * len(group)
        for _ in range(max_tokens):
            # The place of the next token holds an end token, to which no position attends.
            batch = _canvas(rows, len(rows[0]) + 1, ends[0])
            last_BT = batch.position_BT == len(rows[0])
            token_BV = logits(batch.ids_BT, batch.position_BT, allowed(batch, "causal"), last_BT)
            for b, token in enumerate(token_BV.argmax(-1).tolist()):
                rows[b].append(token)
                ended[b] |= token in ends
            if all(ended):
                break
        outputs += [up_to_end(row[len(group[0].prompt) :], ends) for row in rows]
        order += group
    return score(order, outputs, [len(ids) for ids in outputs], tokenizer, ends)


@torch.inference_mode()
def vanilla(
    logits: Logits,
    examples: Sequence[Example],
    tokenizer,
    ends: Sequence[int],
    mask_id: int,
    canvas: int,
) -> Score:
    """Decode with a bidirectional model, in each forward the most confident masked positions."""
    outputs, order, forwards = [], [], []
    for group in by_length(examples):
        prompt = len(group[0].prompt)
        batch = _canvas([list(example.prompt) for example in group], prompt + canvas, ends[0])
        ids_BT = batch.ids_BT.clone()
        ids_BT[:, prompt:] = mask_id
        open_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        open_BT[:, prompt:] = True
        canvas_BT = open_BT.clone()
        full_BTT = allowed(batch, "full")
        rows_B = torch.arange(len(group))
        for _ in range(canvas):
            logits_NV = logits(ids_BT, batch.position_BT, full_BTT, canvas_BT).float()
            logits_BAV = logits_NV.view(len(group), canvas, -1)
            logits_BAV[..., mask_id] = float("-inf")
            sure_BA, token_BA = logits_BAV.softmax(-1).max(-1)
            best_B = sure_BA.where(open_BT[:, prompt:], -1.0).argmax(1)
            ids_BT[rows_B, prompt + best_B] = token_BA[rows_B, best_B]
            open_BT[rows_B, prompt + best_B] = False
        outputs += [up_to_end(row, ends) for row in ids_BT[:, prompt:].tolist()]
        order += group
        forwards += [canvas] * len(group)
    return score(order, outputs, forwards, tokenizer, ends)


def d2f(
    logits: Logits,
    examples: Sequence[Example],
    tokenizer,
    ends: Sequence[int],
    mask_id: int,
    decoding: DecodingSection,
    prompt_block: int | None = None,
    block_origin: str = "prompt_end",
) -> Score:
    """Decode with the reference loop, and score."""
    rule = (decoding, prompt_block, block_origin)
    outputs, forwards = d2f_outputs(logits, examples, ends, mask_id, *rule)
    return score(examples, outputs, forwards, tokenizer, ends)


def d2f_outputs(
    logits: Logits,
    examples: Sequence[Example],
    ends: Sequence[int],
    mask_id: int,
    decoding: DecodingSection,
    prompt_block: int | None = None,
    block_origin: str = "prompt_end",
) -> tuple[list[list[int]], list[int]]:
    """Decode with the reference loop, problem by problem: what the engine is held to.

    The answers come with their end tokens, and with the number of forwards of each.
    """
    params = D2FParams(**decoding.model_dump(exclude={"max_tokens"}))

    @torch.inference_mode()
    def forward(tokens_T: Tensor, mask_TT: Tensor) -> Tensor:
        """Return logits of which row i predicts position i."""
        everywhere_1T = torch.ones(1, len(tokens_T), dtype=torch.bool)
        everywhere_1T[0, 0] = False
        position_1T = torch.arange(len(tokens_T))[None]
        rows_MV = logits(tokens_T[None], position_1T, mask_TT[None], everywhere_1T)
        return torch.cat((torch.zeros_like(rows_MV[:1]), rows_MV))

    outputs, forwards = [], []
    for example in examples:
        ids, count = generate(
            forward,
            list(example.prompt),
            params,
            max_tokens=decoding.max_tokens,
            mask_id=mask_id,
            ends=ends,
            shift=False,  # `logits` has shifted already
            prompt_block=prompt_block,
            block_origin=block_origin,
        )
        outputs.append(ids)
        forwards.append(count)
    return outputs, forwards


def _canvas(rows: list[list[int]], length: int, end: int) -> Batch:
    """Make a batch of prompts of one length, followed by end tokens up to `length`."""
    examples = [Example(tuple(row), (), "") for row in rows]
    return padded(examples, [length] * len(rows), end)
