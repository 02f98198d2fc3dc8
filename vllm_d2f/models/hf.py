# SPDX-License-Identifier: Apache-2.0
"""A D2F checkpoint as transformers' own model, for the reference, the benchmarks and the tests."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from vllm_d2f.models import register_configs

__all__ = ["load_hf"]


def load_hf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a local folder, single file or sharded.

    Returns:
        The model in eval mode, and its config (`mask_token_id`, `end_token_ids`, `logits_shift`).
    """
    register_configs()
    path = Path(path)
    config = transformers.AutoConfig.from_pretrained(path)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= {config.family.to_stack(name): t for name, t in load_file(file).items()}
    if not weights:
        raise FileNotFoundError(f"{path}: no .safetensors files")
    model: Any = getattr(transformers, config.family.hf)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        missing = sorted(set(missing) - tied)
        raise ValueError(f"{path}: tensors missing {missing[:3]}, unknown {unexpected[:3]}")
    return model.to(dtype).eval(), config
