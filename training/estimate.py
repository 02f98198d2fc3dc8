# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: parameters, LoRA targets and memory of a config, from shapes alone.

Models are built on torch's meta device, so an 8B model costs nothing to look at.
"""

from dataclasses import dataclass
from typing import Any

import torch

from training.config import Config, StageSection
from training.model import DTYPES, MODELS, Loaded, add_lora, new_config, open_base

GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """Bytes of one stage on one device, and counts.

    Attributes:
        weights: of the model, and of the teacher's copy in full fine-tuning.
        optimizer: gradients and the two moments of AdamW, float32.
        activations: what the backward pass keeps, one layer's full set with checkpointing.
        logits: student's and teacher's float32 logits, probabilities and gradients at the masked
            positions.
    """

    parameters: int
    trained: int
    targets: tuple[str, ...]
    weights: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations + self.logits


def estimate(config: Config, stage: StageSection) -> Estimate:
    """Estimate one stage, by `model.sizes` if they are given, else by the base's config.json."""
    section = config.model
    hub_config = new_config(section) if section.sizes else open_base(section).config
    config.check_positions(hub_config.max_position_embeddings)
    with torch.device("meta"):
        model: Any = MODELS[section.family](hub_config)
        model = model.to(DTYPES[section.dtype])
        parameters = sum(p.numel() for p in model.parameters())
        targets: tuple[str, ...] = ()
        if stage.lora is not None:
            loaded = Loaded(None, hub_config, section.family, model=model)
            model = add_lora(loaded, stage.lora, 0)
            names = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
            targets = tuple(sorted({n.rsplit(".", 1)[-1] for n in names}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = DTYPES[section.dtype].itemsize
    copies = 2 if stage.objective == "d2f" and stage.lora is None else 1
    adapters = 4 * trained if stage.lora else 0
    data = stage.data or config.data
    tokens = stage.batch_size * data.max_length
    hidden, layers = hub_config.hidden_size, hub_config.num_hidden_layers
    inner = hub_config.intermediate_size
    half = 2 if stage.precision == "bfloat16" or section.dtype == "bfloat16" else 4
    # Inputs of the norms, q, k, v, attention output, gate, up and their product.
    layer = tokens * half * (8 * hidden + 4 * inner)
    kept = (
        layer + layers * tokens * half * hidden
        if section.gradient_checkpointing
        else (layers * layer)
    )
    return Estimate(
        parameters,
        trained,
        targets,
        copies * parameters * size + adapters,
        trained * 4 * 3,
        kept,
        # Ratios average about a half; four arrays of that many rows.
        4 * (tokens // 2) * hub_config.vocab_size * 4,
    )


def dry_run(config: Config) -> str:
    """Return a few lines per stage."""
    lines = [f"{config.name}: {config.model.base or 'a new model'} ({config.model.family})"]
    for name, stage in config.stages.items():
        e = estimate(config, stage)
        updates = f"{stage.steps} updates of {stage.batch_size} x {stage.accumulate} sequences"
        lines += [
            f"  {name}: {stage.objective}, {updates} of {(stage.data or config.data).max_length}",
            f"    parameters  {e.parameters:,}, trained {e.trained:,}"
            + (f", LoRA on {', '.join(e.targets)}" if e.targets else ""),
            (
                f"    memory      {e.total / GIB:.1f} GiB: weights {e.weights / GIB:.1f}, "
                f"optimizer {e.optimizer / GIB:.1f}, activations {e.activations / GIB:.1f}, "
                f"logits {e.logits / GIB:.1f} (one device, estimated)"
            ),
        ]
    return "\n".join(lines)
