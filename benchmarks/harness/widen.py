# SPDX-License-Identifier: Apache-2.0
"""The same model with larger heads, padded with zeros, for kernels that lack its head size.

Tiny models have heads of 16 or 32. vLLM's CUDA backends take no heads of 16, and FlashInfer takes
only heads of 64, 128 and 256. The widened model computes the same function. With heads `factor`
times as large:

- The hidden state is `factor` times as long, and zero behind the real channels. Its mean square is
  smaller by `factor`, so norms take weight / sqrt(factor) and eps / factor.
- The rotary pair of channel i turns with theta ** (-2 i / D) in a head of D channels. In a head of
  factor * D channels this is channel factor * i of either half.
- Scores are divided by sqrt(factor * D) and not by sqrt(D), so queries grow by sqrt(factor).

If `factor` is 4 or 16, all of these scale by powers of 2 and are exact. Only the order of sums
differs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_d2f.models import FAMILIES


def widen(source: Path, target: Path, head_size: int) -> Path:
    """Write the checkpoint of `source` with heads of `head_size` to `target`, and return `target`.

    Raises:
        ValueError: the checkpoint is of another kind, or its heads do not divide `head_size`.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["none"])[0]
    family = FAMILIES.get(architecture)
    if (family.hf if family else architecture) != "Qwen2ForCausalLM":
        raise ValueError(f"{architecture} cannot be widened, only models with Qwen2's layers")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rotary embeddings of another kind cannot be widened: {rope}")
    if not (source / "model.safetensors").is_file():
        raise ValueError(f"{source.name} has no model.safetensors; shards cannot be widened")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = hidden // heads
    if config.get("head_dim") not in (None, size):
        raise ValueError(f"{heads} heads of {config['head_dim']} are not the hidden size {hidden}")
    if head_size % size or head_size < size:
        raise ValueError(f"heads of {size} do not divide {head_size}")
    factor = head_size // size
    counts = {"q": heads, "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    read = load_file(source / "model.safetensors")
    wide = {name: _rule(name, size, factor, counts)(tensor) for name, tensor in read.items()}

    config |= {"hidden_size": factor * hidden, "rms_norm_eps": config["rms_norm_eps"] / factor}
    if "head_dim" in config:
        config["head_dim"] = head_size
    ignore = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in wide.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _rule(name: str, size: int, factor: int, counts: dict[str, int]) -> Callable[[Tensor], Tensor]:
    """Return what widens the tensor of a name."""
    half = factor * torch.arange(size // 2)
    channels = torch.cat((half, half + factor * size // 2))

    def state(tensor: Tensor, dim: int) -> Tensor:
        """Pad a dimension that is the hidden state."""
        shape = list(tensor.shape)
        shape[dim] *= factor - 1
        return torch.cat((tensor, tensor.new_zeros(shape)), dim)

    def channels_out(tensor: Tensor, count: int) -> Tensor:
        """Spread a first dimension that is the channels of `count` heads."""
        out = tensor.new_zeros(count, factor * size, *tensor.shape[1:])
        out[:, channels] = tensor.unflatten(0, (count, size))
        return out.flatten(0, 1)

    part, kind = name.split(".")[-2:]
    if part in ("q_proj", "k_proj", "v_proj"):
        scale = factor**0.5 if part == "q_proj" else 1.0
        if kind == "bias":
            return lambda bias: scale * channels_out(bias, counts[part[0]])
        return lambda weight: scale * state(channels_out(weight, counts[part[0]]), 1)
    if part == "o_proj":
        return lambda weight: state(channels_out(weight.t(), counts["q"]).t(), 0)
    if part in ("gate_proj", "up_proj", "embed_tokens", "lm_head"):
        return lambda weight: state(weight, 1)
    if part == "down_proj":
        return lambda weight: state(weight, 0)
    if part in ("input_layernorm", "post_attention_layernorm", "norm"):
        return lambda weight: state(weight, 0) / factor**0.5
    raise ValueError(f"there is no rule that widens the tensor {name}")
