# SPDX-License-Identifier: Apache-2.0
"""The three trainings: autoregressive model, bidirectional teacher, D2F student.

Shapes: B sequences, T tokens, A positions behind the prompt, M masked positions.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerFast

from training import evaluate, evaluate_d2f, loss, noise
from training.arithmetic import problems
from training.batches import Batch, training_batch
from training.fit import FitConfig, fit
from training.model import ModelConfig, TinyQwen2, attention_bias
from vllm_d2f.d2f import D2FParams, may_attend


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the three models."""

    step_counts: tuple[int, ...] = (2, 3, 4, 5, 6)
    block_size: int = 16
    ar: FitConfig = field(default_factory=lambda: FitConfig(steps=1100, lr=3e-3, seed=1))
    teacher: FitConfig = field(default_factory=lambda: FitConfig(steps=3500, lr=2e-3, seed=2))
    student: FitConfig = field(
        default_factory=lambda: FitConfig(steps=600, lr=3e-4, save_every=200, seed=3)
    )
    schedule: str = "chain_uniform"
    data_weight: float = 0.0
    bf16: bool = True
    compile: bool = True
    watched: int = 200
    """Validation problems decoded whenever a checkpoint is saved."""


def _generator(config: FitConfig, step: int) -> Generator:
    return Generator().manual_seed(config.seed * 1_000_003 + step)


def _weights(batch: Batch, chosen_BT: Tensor) -> Tensor:
    """Loss weights (M,): less for the tail of end tokens."""
    weights_T = torch.ones(chosen_BT.shape[1])
    weights_T[batch.prompt_len + batch.answer_len :] = loss.TAIL_WEIGHT
    return weights_T.expand(chosen_BT.shape)[chosen_BT]


def _autocast(recipe: Recipe) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16)


def _model(recipe: Recipe, config: ModelConfig) -> TinyQwen2:
    model = TinyQwen2(config)
    if recipe.compile:
        model.compile_layers()
    return model


def train_ar(
    recipe: Recipe, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> TinyQwen2:
    """Next-token training on the answers."""
    torch.manual_seed(recipe.ar.seed)
    model = _model(recipe, config)
    held_out = problems("validation", recipe.watched, "watch", recipe.step_counts)

    def loss_of_step(step: int) -> Tensor:
        batch = training_batch(
            step, recipe.ar.seed, recipe.ar.batch_size, recipe.step_counts, tokenizer, None
        )
        chosen_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.bool)
        chosen_BT[:, batch.prompt_len :] = True
        bias_1TT = evaluate.causal_bias(batch.ids_BT.shape[1])
        with _autocast(recipe):
            logits_MV = model.predict(batch.ids_BT, bias_1TT, chosen_BT)
        weights_M = _weights(batch, chosen_BT)
        return loss.masked_cross_entropy(logits_MV, batch.ids_BT[chosen_BT], weights_M)

    def watch() -> dict[str, float]:
        return {"exact": evaluate.teacher_forced(model, held_out, tokenizer)}

    fit(model, loss_of_step, recipe.ar, directory, watch)
    return model


def _noised(
    batch: Batch, ratios_BA: Tensor, generator: Generator, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Noised ids and the masked positions, both (B, T)."""
    masked_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.bool)
    masked_BT[:, batch.prompt_len :] = noise.draw_mask(ratios_BA, generator)
    return batch.ids_BT.masked_fill(masked_BT, mask_id), masked_BT


def train_teacher(
    recipe: Recipe, start: TinyQwen2, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> TinyQwen2:
    """Masked diffusion under full attention, from the autoregressive weights (Dream's recipe)."""
    torch.manual_seed(recipe.teacher.seed)
    model = _model(recipe, start.config)
    model.load_state_dict(start.state_dict())
    held_out = problems("validation", recipe.watched // 4, "watch", recipe.step_counts)
    fc = recipe.teacher

    def loss_of_step(step: int) -> Tensor:
        batch = training_batch(
            step, fc.seed, fc.batch_size, recipe.step_counts, tokenizer, recipe.block_size
        )
        generator = _generator(fc, step)
        B, T = batch.ids_BT.shape
        ratios_BA = noise.teacher_ratios(B, T - batch.prompt_len, batch.answer_len, generator)
        noised_BT, masked_BT = _noised(batch, ratios_BA, generator, tokenizer.mask_token_id)
        with _autocast(recipe):
            logits_MV = model.predict(noised_BT, torch.zeros(1, T, T), masked_BT)
        weights_M = _weights(batch, masked_BT)
        return loss.masked_cross_entropy(logits_MV, batch.ids_BT[masked_BT], weights_M)

    def watch() -> dict[str, float]:
        result = evaluate.one_token_per_step(model, held_out, tokenizer)
        return {"exact": result.exact, "final": result.final}

    fit(model, loss_of_step, fc, directory, watch)
    return model


def block_causal_bias(T: int, prompt_len: int, block_size: int) -> Tensor:
    """The attention rule of D2F as an additive bias, (1, T, T)."""
    position_T = torch.arange(T)
    allowed_TT = may_attend(position_T[:, None], position_T[None], prompt_len, block_size)
    return attention_bias(allowed_TT)[None]


def train_student(
    recipe: Recipe, teacher: TinyQwen2, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> TinyQwen2:
    """Distil the teacher, which sees the whole noised sequence, into a block-causal student."""
    torch.manual_seed(recipe.student.seed)
    model = _model(recipe, teacher.config)
    model.load_state_dict(teacher.state_dict())
    teacher.requires_grad_(False)
    held_out = problems("validation", recipe.watched, "watch", recipe.step_counts)
    params = D2FParams(block_size=recipe.block_size)
    fc = recipe.student

    def loss_of_step(step: int) -> Tensor:
        batch = training_batch(
            step, fc.seed, fc.batch_size, recipe.step_counts, tokenizer, recipe.block_size
        )
        generator = _generator(fc, step)
        B, T = batch.ids_BT.shape
        blocks = (T - batch.prompt_len) // recipe.block_size
        ratios_BN = noise.student_ratios(B, blocks, recipe.schedule, generator)
        ratios_BA = ratios_BN.repeat_interleave(recipe.block_size, 1)
        noised_BT, masked_BT = _noised(batch, ratios_BA, generator, tokenizer.mask_token_id)
        bias_1TT = block_causal_bias(T, batch.prompt_len, recipe.block_size)
        with _autocast(recipe):
            with torch.no_grad():
                teacher_MV = teacher.predict(noised_BT, torch.zeros(1, T, T), masked_BT)
            logits_MV = model.predict(noised_BT, bias_1TT, masked_BT)
        weights_M = _weights(batch, masked_BT)
        total = loss.distillation(logits_MV, teacher_MV, weights_M)
        if recipe.data_weight:
            targets_M = batch.ids_BT[masked_BT]
            data = loss.masked_cross_entropy(logits_MV, targets_M, weights_M)
            total = total + recipe.data_weight * data
        return total

    def watch() -> dict[str, float]:
        result = evaluate_d2f.batched(model, held_out, tokenizer, params)
        return {"exact": result.exact, "tokens_per_forward": result.tokens_per_forward}

    fit(model, loss_of_step, fc, directory, watch)
    return model
