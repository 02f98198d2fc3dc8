# SPDX-License-Identifier: Apache-2.0
"""A D2F checkpoint as transformers' own model, for the reference, the benchmarks and the tests."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from vllm_d2f.models import family_config, register_configs

__all__ = ["load_hf"]


def load_hf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a local folder, single file or sharded.

    Returns:
        The model in eval mode, and its config (`mask_token_id`, `end_token_ids`, `logits_shift`).
    """
    register_configs()
    path = Path(path)
    config = family_config(transformers.AutoConfig.from_pretrained(path))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= {config.family.to_stack(name): t for name, t in load_file(file).items()}
    if not weights:
        raise FileNotFoundError(f"{path}: no .safetensors files")
    for name in [name for name in weights if ".qkv_proj." in name]:  # transformers has them apart
        heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
        parts = weights.pop(name).split([config.head_dim * count for count in heads])
        weights |= {name.replace("qkv", part): t for part, t in zip("qkv", parts, strict=True)}
    stack: Any = getattr(transformers, config.family.hf)
    # transformers keeps the experts of a layer in one tensor. Which checkpoints it converts, and
    # how, it finds by model_type.
    conversion = get_checkpoint_conversion_mapping(stack.config_class.model_type)
    if conversion is not None:
        register_checkpoint_conversion_mapping(config.model_type, conversion, overwrite=True)
    model, report = stack.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected:
        raise ValueError(f"{path}: tensors missing {sorted(missing)[:3]}, unknown {unexpected[:3]}")
    return model.eval(), config
