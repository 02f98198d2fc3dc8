# SPDX-License-Identifier: Apache-2.0
"""Write a trained model as a folder in the Hub's layout, which transformers and vLLM load as it is.

A folder appears, or changes, as a whole.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from training.checkpoint import whole_folder
from training.config import DecodingSection, StageSection
from training.model import AUTOREGRESSIVE, BY_NAME, MASK_ROW, Loaded, adapter_state

KINDS = {
    "next_token": "Autoregressive.",
    "diffusion": "Bidirectional masked diffusion; needs full attention.",
    "d2f": "Discrete Diffusion Forcing: attention is bidirectional inside a block and causal "
    "between blocks, so that finished blocks stay in the KV cache.",
}

SHARD = "5GB"

WRITTEN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
"""Fields that the config of a new model always has, even with the class's default."""


def export(
    loaded: Loaded,
    net: Any,
    stage: StageSection,
    decoding: DecodingSection,
    directory: Path,
    card: str,
    base: str | None = None,
) -> None:
    """Write config, weights, tokenizer and card of `net`.

    Args:
        net: what was trained; with an adapter it is merged, or written alone if `stage.merge` is
            False.
        base: the name of the base, for an adapter's config.
    """
    with whole_folder(directory) as part:
        if hasattr(net, "peft_config") and not stage.merge:
            _write_adapter(part, loaded, net, stage, card, base)
            if loaded.family in AUTOREGRESSIVE:  # what a merge makes of the base
                _write_small_files(part, loaded, stage, decoding)
        else:
            _write_model(part, loaded, merged_state(net), stage, decoding, card)


def merged_state(net: Any) -> dict[str, Tensor]:
    """Return weights by Llama's or Qwen2's names. Adapters are added in float32, rounded once."""
    if not hasattr(net, "peft_config"):
        return dict(net.state_dict())
    state: dict[str, Tensor] = {}
    for name, module in net.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            base = module.base_layer
            delta = module.get_delta_weight("default").float()
            state[f"{name}.weight"] = (base.weight.float() + delta).to(base.weight.dtype)
            if base.bias is not None:
                state[f"{name}.bias"] = base.bias
    for name, tensor in net.get_base_model().state_dict().items():
        if ".lora_" not in name and ".base_layer." not in name and MASK_ROW not in name:
            state[name] = tensor
    embedding = net.get_base_model().model.embed_tokens
    if hasattr(embedding, MASK_ROW):
        state["model.embed_tokens.weight"] = embedding.weight.clone()
        state["model.embed_tokens.weight"][embedding.mask_id] = embedding.mask_row.to(
            embedding.weight.dtype
        )
    return state


def hub_config(loaded: Loaded, stage: StageSection, decoding: DecodingSection) -> dict[str, Any]:
    """Return `config.json`: the base's with a `d2f` section, or a new model's."""
    if loaded.folder is not None:
        values = json.loads((loaded.folder / "config.json").read_text())
        values.pop("auto_map", None)  # no remote code
    else:
        values = _plain_config(loaded, stage)
    values.pop("d2f", None)
    if loaded.family in AUTOREGRESSIVE:
        plain, own = stage.objective == "next_token", BY_NAME[loaded.family]
        values |= {
            "architectures": [own.hf if plain else own.architecture],
            "model_type": loaded.family if plain else own.model_type,
            "vocab_size": loaded.config.vocab_size,
            "mask_token_id": loaded.mask_id,
        }
        if plain:
            del values["mask_token_id"]
    if stage.objective == "d2f":
        values["d2f"] = d2f_section(loaded.family, stage, decoding)
    return values


def d2f_section(family: str, stage: StageSection, decoding: DecodingSection) -> dict[str, Any]:
    """Return what `vllm_d2f.settings` reads."""
    section = decoding.model_dump(exclude={"max_tokens"})
    if section["accept"] == "threshold":
        del section["accept"]  # the default
    if "block_causal" in (stage.loss.prompt_attention, BY_NAME[family].prompt_attention):
        section["prompt_attention"] = stage.loss.prompt_attention
    if "zero" in (stage.loss.block_origin, BY_NAME[family].block_origin):
        section["block_origin"] = stage.loss.block_origin
    return section


def _plain_config(loaded: Loaded, stage: StageSection) -> dict[str, Any]:
    config = loaded.config
    values = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "d2f", "dtype", "use_cache"):
        values.pop(name, None)
    values.pop("logits_shift", None)  # the family's
    rope = values.pop("rope_parameters", None) or config.rope_parameters
    values |= {
        "architectures": [BY_NAME[loaded.family].architecture],
        "model_type": config.model_type,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "mask_token_id": config.mask_token_id,
        "use_cache": True,
    }
    values |= {name: getattr(config, name) for name in WRITTEN}
    if stage.objective == "next_token" and loaded.family == "dream":
        values |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        del values["mask_token_id"]
    return dict(sorted(values.items()))


def _write_model(
    part: Path,
    loaded: Loaded,
    state: Mapping[str, Tensor],
    stage: StageSection,
    decoding: DecodingSection,
    card: str,
) -> None:
    _write_small_files(part, loaded, stage, decoding)
    if loaded.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    renamed = stage.objective != "next_token"
    to_checkpoint = BY_NAME[loaded.family].to_checkpoint
    weights = {
        (to_checkpoint(name) if renamed else name): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    save_torch_state_dict(weights, part, max_shard_size=SHARD, metadata={"format": "pt"})
    for file in part.glob("*.safetensors"):
        file.chmod(0o644)
    (part / "README.md").write_text(card)


def _write_small_files(
    part: Path, loaded: Loaded, stage: StageSection, decoding: DecodingSection
) -> None:
    _write_tokenizer(part, loaded)
    _write_json(part / "config.json", hub_config(loaded, stage, decoding))
    _write_json(part / "generation_config.json", _generation(loaded))


def _write_adapter(
    part: Path, loaded: Loaded, net: Any, stage: StageSection, card: str, base: str | None
) -> None:
    """Write an adapter in PEFT's layout, with the module names of the official base."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    assert stage.lora is not None
    weights = {}
    # PEFT would add the whole head if it is among the targets.
    for name, tensor in get_peft_model_state_dict(net, save_embedding_layers=False).items():
        inner = name.removeprefix("base_model.model.")
        inner = BY_NAME[loaded.family].to_checkpoint(inner)
        weights[f"base_model.model.{inner}"] = tensor.detach().cpu().contiguous()
    # Names of the official base. Its head may have the name of a module in the layers.
    modules = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in weights}
    ends = {m.rpartition(".")[2] if re.search(r"\.\d+\.", m) else m for m in modules}
    config = net.peft_config["default"].to_dict()
    embedding = net.get_base_model().model.embed_tokens
    if hasattr(embedding, MASK_ROW):
        key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        weights[key] = embedding.mask_row.detach()[None].cpu()
        config["trainable_token_indices"] = {"embed_tokens": [embedding.mask_id]}
    save_file(weights, part / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {
        "target_modules": sorted(ends),
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    _write_json(part / "adapter_config.json", {k: _plain(v) for k, v in config.items()})
    (part / "README.md").write_text(card)


def _plain(value: Any) -> Any:
    """Turn PEFT's sets and enums into what JSON has."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def _generation(loaded: Loaded) -> dict[str, Any]:
    eos = loaded.config.eos_token_id
    values = {"do_sample": False, "eos_token_id": eos, "pad_token_id": loaded.config.pad_token_id}
    if loaded.config.bos_token_id is not None:
        values["bos_token_id"] = loaded.config.bos_token_id
    return dict(sorted(values.items()))


def _write_tokenizer(part: Path, loaded: Loaded) -> None:
    loaded.tokenizer.save_pretrained(part)
    if loaded.folder is not None:
        return
    # A template of its own file is not read by older readers of tokenizer_config.json.
    settings_file, template_file = part / "tokenizer_config.json", part / "chat_template.jinja"
    settings = json.loads(settings_file.read_text())
    if template_file.exists():
        settings["chat_template"] = template_file.read_text()
        template_file.unlink()
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(settings_file, settings)


def save_weights(net: Any, path: Path) -> None:
    """Write the trained weights of a finished stage: all of them, or an adapter's."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    state = net.state_dict()
    if hasattr(net, "peft_config"):
        state = adapter_state(net)
    elif net.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, part)
    os.replace(part, path)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
