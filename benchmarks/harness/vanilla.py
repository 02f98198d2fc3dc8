# SPDX-License-Identifier: Apache-2.0
"""Vanilla diffusion decoding of a Dream or LLaDA teacher: what D2F is compared with.

As published: a canvas of `length` masks behind the prompt, full bidirectional attention over prompt
and canvas, everything recomputed in every step, and the `length / steps` most confident masked
positions decoded in each. One token per step is the published quality setting. No cache, no batch.

Two things are in its favour: the language-model head sees the canvas only, and only still masked
positions are compared.

Shapes: T tokens of prompt and canvas, A positions of the canvas, V vocabulary, N masked positions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.engine import Answer, Batch, peak_mib, reset_peak
from benchmarks.harness.record import UsageError
from benchmarks.harness.workload import Item, grade


@dataclass(frozen=True, slots=True)
class Setting:
    """Canvas length and tokens decoded per step; written `512:1`."""

    length: int
    per_step: int = 1

    @classmethod
    def parse(cls, text: str) -> "Setting":
        try:
            length, _, per_step = text.partition(":")
            setting = cls(int(length), int(per_step or 1))
        except ValueError:
            raise ValueError(f"{text!r}: write LENGTH:TOKENS_PER_STEP, such as 512:1") from None
        if not 1 <= setting.per_step <= setting.length:
            raise ValueError(f"{text!r}: tokens per step must be in [1, length]")
        return setting

    @property
    def steps(self) -> int:
        return -(-self.length // self.per_step)

    def __str__(self) -> str:
        return f"{self.length}:{self.per_step}"


def parse_settings(option: str, texts: Sequence[str]) -> tuple[Setting, ...]:
    """Return the settings that an option names.

    Raises:
        UsageError: one of them is none.
    """
    try:
        return tuple(map(Setting.parse, texts))
    except ValueError as error:
        raise UsageError(f"{option} {error}") from None


@torch.inference_mode()
def decode_canvas(
    model: torch.nn.Module, prompt: Sequence[int], setting: Setting, *, mask_id: int, shift: bool
) -> tuple[list[int], int]:
    """Decode one canvas greedily to its end. Return its tokens and the number of forwards.

    With `shift` the output at position i - 1 predicts position i (Dream); else the one at i.
    """
    device = next(model.parameters()).device
    ids_T = torch.tensor([*prompt, *[mask_id] * setting.length], device=device)
    length, at = len(ids_T), len(prompt)
    # A 4-D mask switches the causal default of transformers off.
    full_TT = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    keep_A = torch.arange(at - shift, length - shift, device=device)
    open_A = torch.ones(setting.length, dtype=torch.bool, device=device)
    for _ in range(setting.steps):
        logits_AV = model(
            ids_T[None], attention_mask=full_TT, use_cache=False, logits_to_keep=keep_A
        ).logits[0]
        place_N = open_A.nonzero()[:, 0]
        logits_NV = logits_AV[place_N].float()
        logits_NV[:, mask_id] = float("-inf")
        confidence_N, token_N = logits_NV.softmax(-1).max(-1)
        best = confidence_N.topk(min(setting.per_step, len(place_N))).indices
        ids_T[at + place_N[best]] = token_N[best]
        open_A[place_N[best]] = False
    return ids_T[at:].tolist(), setting.steps


class Vanilla:
    """The teacher in plain transformers, asked one question at a time."""

    simulated = None

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        from vllm_d2f.models.hf import load_hf

        cuda = torch.cuda.is_available()
        hf_model, self.config = load_hf(model, torch.bfloat16 if cuda else torch.float32)
        self.model = hf_model.to("cuda" if cuda else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def measure(self, items: Sequence[Item], setting: Setting, offset: int = 0) -> list[Batch]:
        """Answer the items one after the other."""
        return [self._batch(item, setting, offset + at) for at, item in enumerate(items)]

    def _batch(self, item: Item, setting: Setting, index: int) -> Batch:
        reset_peak()
        began, cpu = time.perf_counter(), time.process_time()
        prompt = self.tokenizer(item.question).input_ids
        mask_id, shift = self.config.mask_token_id, self.config.logits_shift
        canvas, forwards = decode_canvas(self.model, prompt, setting, mask_id=mask_id, shift=shift)
        ended, ids = up_to_end(canvas, self.config.end_token_ids)
        text: Any = self.tokenizer.decode(ids, skip_special_tokens=True)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        graded = grade(item, text, ended)
        answer = Answer(
            item=index, final=graded.final, exact=graded.exact, useful=len(ids) + ended,
            raw=setting.length, forwards=forwards, computed=forwards * setting.length,
            prompt=len(prompt),
            first_s=seconds, last_s=seconds,  # the whole canvas is there at once
            text=text, ended=ended,
        )  # fmt: skip
        return Batch(seconds, cpu_s, forwards, (answer,), peak_mib())


def up_to_end(canvas: Sequence[int], ends: Sequence[int]) -> tuple[bool, list[int]]:
    """Return whether a canvas has an end token, and the tokens before the first one."""
    for at, token in enumerate(canvas):
        if token in ends:
            return True, list(canvas[:at])
    return False, list(canvas)
