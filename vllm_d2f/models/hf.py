# SPDX-License-Identifier: Apache-2.0
"""A Dream or LLaDA folder as transformers' own Qwen2 or Llama: what the reference loop runs on."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_d2f.models.olmo_names import to_llama

__all__ = ["load_hf"]


def load_hf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a local folder, single file or sharded.

    Returns:
        The model in eval mode, and its config (`mask_token_id`, `end_token_ids`, `logits_shift`).
    """
    from transformers import AutoConfig, LlamaForCausalLM, Qwen2ForCausalLM

    from vllm_d2f.models import register_configs

    register_configs()
    path = Path(path)
    config = AutoConfig.from_pretrained(path)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= load_file(file)
    if not weights:
        raise FileNotFoundError(f"{path}: no .safetensors files")
    if config.model_type == "Dream":
        model: Any = Qwen2ForCausalLM(config)
    else:
        model = LlamaForCausalLM(config)
        weights = {to_llama(name): tensor for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"{path}: tensors missing {sorted(set(missing) - tied)[:3]}, "
            f"unknown {sorted(unexpected)[:3]}"
        )
    return model.to(dtype).eval(), config
