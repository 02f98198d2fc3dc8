# SPDX-License-Identifier: Apache-2.0
"""The same Dream model with larger heads, so that kernels for head sizes from 64 on run it.

The embedded models have heads of 32, which FlashInfer does not take. Padded with zeros, the
widened model computes the same function (its logits differ by rounding):
- The hidden size grows with the heads. A mean of squares over `factor` times as many channels, most
  of them 0, is `factor` times smaller, so norms take weight / sqrt(factor) and eps / factor.
- Rotary pairs of channel i turn with theta ** (-2 i / D). In a head of `factor * D` that is channel
  factor * i, in either half of the head.
- Scores are divided by sqrt(factor * D): queries are larger by sqrt(factor).
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def widen(source: Path, target: Path, factor: int) -> Path:
    """Write the widened checkpoint of a Dream or Qwen2 folder with one weights file.

    Raises:
        ValueError: the folder is of another family.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in ("Dream", "qwen2"):
        raise ValueError(f"model_type {config['model_type']}: only Dream and qwen2 can be widened")
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    hidden = config["hidden_size"]
    size = hidden // heads
    wide_hidden = factor * hidden
    channel = _channels(size, factor)

    def columns(weight: Tensor) -> Tensor:
        """Inputs are the hidden state: zeros behind it."""
        return torch.nn.functional.pad(weight, (0, wide_hidden - hidden))

    def rows(weight: Tensor) -> Tensor:
        """Outputs are added to the hidden state."""
        return torch.cat((weight, weight.new_zeros(wide_hidden - hidden, *weight.shape[1:])))

    def heads_out(weight: Tensor, count: int) -> Tensor:
        """Outputs are the channels of heads."""
        out = weight.new_zeros(count, factor * size, *weight.shape[1:])
        out[:, channel] = weight.view(count, size, *weight.shape[1:])
        return out.flatten(0, 1)

    weights: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        part = name.rsplit(".", 2)[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            count = heads if part == "q_proj" else kv_heads
            weight = heads_out(weight, count)
            if weight.dim() == 2:
                weight = columns(weight)
            if part == "q_proj":
                weight = weight * factor**0.5
        elif part == "o_proj":
            weight = rows(heads_out(weight.t().contiguous(), heads).t())
        elif part in ("gate_proj", "up_proj", "embed_tokens", "lm_head"):
            weight = columns(weight)
        elif part == "down_proj":
            weight = rows(weight)
        elif "norm" in part:
            weight = rows(weight) / factor**0.5
        else:
            raise ValueError(f"{name}: no rule for this tensor")
        weights[name] = weight.contiguous()

    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, target / file.name)
    config["hidden_size"] = wide_hidden
    config["rms_norm_eps"] = config["rms_norm_eps"] / factor
    if "head_dim" in config:
        config["head_dim"] = factor * size
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _channels(size: int, factor: int) -> Tensor:
    """Where each channel of a head goes: halves stay halves, pairs keep their angle."""
    half = torch.arange(size // 2) * factor
    return torch.cat((half, half + factor * size // 2))
