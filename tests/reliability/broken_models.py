# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose logits are wrong in one way each, in Dream's and LLaDA's layout."""

from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import change_weights, write_dream, write_llada

VOCAB, MASK, END, POISON = 200, 198, 199, 7
NAN_TOKEN, INF_TOKEN = 17, 23

Weights = dict[str, torch.Tensor]


def _named(weights: Weights, dream: str, llada: str) -> torch.Tensor:
    return weights[dream] if dream in weights else weights[llada]


def head(weights: Weights) -> torch.Tensor:
    """Return the language-model head, [vocabulary, hidden]."""
    return _named(weights, "lm_head.weight", "model.transformer.ff_out.weight")


def embedding(weights: Weights) -> torch.Tensor:
    """Return the token embedding, [vocabulary, hidden]."""
    return _named(weights, "model.embed_tokens.weight", "model.transformer.wte.weight")


def _nan(weights: Weights) -> None:
    head(weights)[NAN_TOKEN] = torch.nan


def _inf(weights: Weights) -> None:
    # Plus infinity where channel 0 is positive, minus infinity (a token that is never taken) else.
    head(weights)[INF_TOKEN] = 0
    head(weights)[INF_TOKEN, 0] = torch.inf


def _all_nan(weights: Weights) -> None:
    head(weights)[:] = torch.nan


def _equal(weights: Weights) -> None:
    head(weights)[:] = 0


def _mask(weights: Weights) -> None:
    # A channel that stands out everywhere, and a mask token that listens to it alone.
    embedding(weights)[:, 0] = 30
    head(weights)[:, 0] = 0
    head(weights)[MASK] = 0
    head(weights)[MASK, 0] = 50


def _poison(weights: Weights) -> None:
    embedding(weights)[POISON] = torch.nan


BROKEN: dict[str, Callable[[Weights], None]] = {
    "nan": _nan,
    "inf": _inf,
    "all_nan": _all_nan,
    "equal": _equal,
    "mask": _mask,
    "poison": _poison,
}
"""What a broken model says: a NaN, an infinity or nothing but NaN in its logits; the same logit for
every token (so it never ends); the mask token above all; NaN from prompts with the token POISON."""


def write_broken(path: Path, kind: str, layout: str = "dream") -> str:
    """Write such a checkpoint; no tokenizer. `layout` is "dream" or "llada"."""
    write = {"dream": write_dream, "llada": write_llada}[layout]
    return str(change_weights(write(path, vocab_size=VOCAB, tokenizer=False), BROKEN[kind]))
