# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints in the layouts of the official ones, and their Hugging Face twins.

The weights are scaled so that a random model behaves like a trained one where it matters to D2F:
the most probable token differs from position to position, and its probability spreads over all of
(0, 1) with a good share above 0.9. With the usual 0.02 every position would give one token at
confidence 1 / vocab_size, and a decoder could be wrong without a test noticing.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Llama's tensor names -> OLMo's, which LLaDA's checkpoints use. Written out here on its own: the
# tests must not take the mapping from the code they test.
_OLMO_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_OLMO_TOP_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}

MASK_TOKEN = "<|mask|>"
END_TOKEN = "<|endoftext|>"


def write_dream(
    path: str | Path,
    *,
    vocab_size: int = 200,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 160,
    max_positions: int = 1024,
    seed: int = 0,
    d2f: dict[str, Any] | None = None,
    shards: int = 1,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    head_scale: float = 1.0,
) -> Path:
    """Write a checkpoint like Dream's on the Hub: Qwen2 names, q/k/v bias, names of remote code.

    Args:
        path: the folder, made if missing.
        head_scale: a larger one makes the model more confident.
        d2f: the optional section of that name in config.json.
        shards: weight files; above one they come with an index.
    """
    path = Path(path)
    config = {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "mask_token_id": vocab_size - 2,
        "max_position_embeddings": max_positions,
        "max_window_layers": 28,
        "model_type": "Dream",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": vocab_size - 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    weights = _random_weights(
        vocab_size, hidden, layers, heads, kv_heads, intermediate, seed, head_scale, qkv_bias=True
    )
    _write(path, config, weights, d2f, shards, dtype)
    if tokenizer:
        write_dream_tokenizer(path, vocab_size)
    return path


def write_llada(
    path: str | Path,
    *,
    vocab_size: int = 200,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate: int = 160,
    max_positions: int = 1024,
    seed: int = 0,
    d2f: dict[str, Any] | None = None,
    shards: int = 1,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    head_scale: float = 1.0,
) -> Path:
    """Write a checkpoint as LLaDA's on the Hub: OLMo names everywhere, no bias."""
    path = Path(path)
    kv_heads = kv_heads or heads
    config = {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": hidden,
        "embedding_dropout": 0.0,
        "embedding_size": vocab_size,
        "eos_token_id": vocab_size - 1,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": vocab_size - 2,
        "max_sequence_length": max_positions,
        "mlp_hidden_size": intermediate,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "n_layers": layers,
        "pad_token_id": vocab_size - 1,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": vocab_size,
        "weight_tying": False,
    }
    weights = _random_weights(
        vocab_size, hidden, layers, heads, kv_heads, intermediate, seed, head_scale, qkv_bias=False
    )
    weights = {_olmo_name(name): tensor for name, tensor in weights.items()}
    _write(path, config, weights, d2f, shards, dtype)
    if tokenizer:
        write_llada_tokenizer(path, vocab_size)
    return path


def write_toy(path: str | Path, **options: Any) -> Path:
    """Write a checkpoint of the toy family (see `toy_family`): Qwen3 with names of its own."""
    return _write_hf(
        path, "ToyQwen3ForCausalLM", "toy_qwen3", head_dim=32, rename=_toy_name, **options
    )


def write_adapted(path: str | Path, stack: str, **options: Any) -> Path:
    """Write a checkpoint of an adapted family: `stack` is "Llama", "Qwen2" or "Qwen3"."""
    options |= {"qkv_bias": stack == "Qwen2", "head_dim": 32 if stack == "Qwen3" else None}
    return _write_hf(path, f"D2F{stack}ForCausalLM", f"d2f_{stack.lower()}", **options)


def write_sdar_moe(path: str | Path, experts: int = 8, **options: Any) -> Path:
    """Write a checkpoint as SDAR-30B-A3B's on the Hub: Qwen3's names, every layer with experts."""
    more = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_experts": experts,
        "num_experts_per_tok": 2,
    }
    return _write_hf(path, "SDARMoeForCausalLM", "sdar_moe", head_dim=32, more=more, **options)


def write_dream_reasoner(path: Path) -> Path:
    """Copy SDAR's tiny checkpoint under the names of DreamReasoner's config.json."""
    sdar = Path(__file__).parent / "data" / "sdar"
    shutil.copy(sdar / "model.safetensors", path)
    config = json.loads((sdar / "config.json").read_text())
    config |= {"architectures": ["DreamForCausalLM"], "model_type": "Dream", "block_size": 32}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_dream.DreamForCausalLM"}
    del config["head_dim"], config["sliding_window"]
    (path / "config.json").write_text(json.dumps(config))
    return path


def _with_experts(weights: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """Give every MLP as many variants of its first 32 neurons, and a router."""
    generator, made = torch.Generator().manual_seed(7), {}
    for name, tensor in weights.items():
        layer, found, projection = name.partition(".mlp.")
        if not found:
            made[name] = tensor
            continue
        small = tensor[:, :32] if projection.startswith("down") else tensor[:32]
        for expert in range(experts):
            noise = torch.randn(small.shape, generator=generator) * small.std()
            made[f"{layer}.mlp.experts.{expert}.{projection}"] = small + noise
        router = torch.randn(experts, weights["model.norm.weight"].numel(), generator=generator)
        made[f"{layer}.mlp.gate.weight"] = router / 4
    return made


def _write_hf(
    path: str | Path,
    architecture: str,
    model_type: str,
    *,
    vocab_size: int = 200,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    intermediate: int = 160,
    max_positions: int = 1024,
    seed: int = 0,
    d2f: dict[str, Any] | None = None,
    shards: int = 1,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    head_scale: float = 1.0,
    rename: Callable[[str], str] = str,
    more: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with transformers' field names.

    Args:
        head_dim: Qwen3's, wider than hidden / heads as in most of its sizes; it brings norms.
        rename: a tensor's name in transformers -> in the checkpoint.
        more: further fields of config.json; with `num_experts` every layer is a mixture of experts.
    """
    path = Path(path)
    config = {
        "architectures": [architecture],
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "mask_token_id": vocab_size - 2,
        "max_position_embeddings": max_positions,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": vocab_size - 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.51.0",
        "vocab_size": vocab_size,
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    config |= more or {}
    sizes = (vocab_size, hidden, layers, heads, kv_heads, intermediate)
    weights = _random_weights(*sizes, seed, head_scale, qkv_bias=qkv_bias, head_dim=head_dim)
    if "num_experts" in config:
        weights = _with_experts(weights, config["num_experts"])
    weights = {rename(name): tensor for name, tensor in weights.items()}
    _write(path, config, weights, d2f, shards, dtype)
    if tokenizer:
        write_llada_tokenizer(path, vocab_size)
    return path


@contextmanager
def toy_family() -> Iterator[Any]:
    """Register the toy family here and, by its entry point, in the processes that vLLM starts."""
    from vllm_d2f.models import FAMILIES, PRESETS

    folder, before = str(Path(__file__).parent / "toy"), os.environ.get("PYTHONPATH")
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = folder if before is None else f"{folder}{os.pathsep}{before}"
    module = importlib.import_module("toy_family")
    module.register()
    try:
        yield module.FAMILY
    finally:
        sys.path.remove(folder)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
        del FAMILIES[module.FAMILY.architecture]
        for name in module.FAMILY.preset_names:
            del PRESETS[name]


def change_weights(path: str | Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Let `change` edit the tensors of a folder with one weight file, in place."""
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file({n: t.contiguous() for n, t in weights.items()}, file, metadata={"format": "pt"})
    return Path(path)


def hf_twin(path: str | Path) -> Any:
    """Load transformers' own model with the weights of `path`, float32, in eval mode."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    path = Path(path)
    config = json.loads((path / "config.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= load_file(file)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if config["model_type"] == "Dream":
        model: Any = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=config["num_attention_heads"],
                num_key_value_heads=config["num_key_value_heads"],
                max_position_embeddings=config["max_position_embeddings"],
                rms_norm_eps=config["rms_norm_eps"],
                rope_theta=config.get("rope_theta")
                or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                attn_implementation="sdpa",
            )
        )
    elif (stack := config["model_type"].rpartition("_")[2]) in ("llama", "qwen2", "qwen3"):
        plain = {k: v for k, v in config.items() if k not in ("model_type", "d2f")}
        config_cls, model_cls = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[stack]
        model = model_cls(config_cls(**plain, attn_implementation="sdpa"))
        weights = {
            name.replace("decoder", "model").replace(".attention.", ".self_attn."): tensor
            for name, tensor in weights.items()
        }
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config["vocab_size"],
                hidden_size=config["d_model"],
                intermediate_size=config["mlp_hidden_size"],
                num_hidden_layers=config["n_layers"],
                num_attention_heads=config["n_heads"],
                num_key_value_heads=config["n_kv_heads"],
                max_position_embeddings=config["max_sequence_length"],
                rms_norm_eps=config["rms_norm_eps"],
                rope_theta=config["rope_theta"],
                tie_word_embeddings=config.get("weight_tying", False),
                attn_implementation="sdpa",
            )
        )
        weights = {_llama_name(name): tensor for name, tensor in weights.items()}
    tied = model.config.tie_word_embeddings
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    return model.float().eval()


def _random_weights(
    vocab_size: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    seed: int,
    head_scale: float,
    qkv_bias: bool,
    head_dim: int | None = None,
) -> dict[str, torch.Tensor]:
    """Draw weights under Llama's names, float32; with a `head_dim` also Qwen3's norms."""
    generator = torch.Generator().manual_seed(seed)
    q_size = (head_dim or hidden // heads) * heads
    kv_size = (head_dim or hidden // heads) * kv_heads

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    def linear(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return normal(rows, columns, std=gain * columns**-0.5)

    def norm(size: int = hidden, mean: float = 1.0) -> torch.Tensor:
        return mean + normal(size, std=0.1)

    weights = {
        "model.embed_tokens.weight": normal(vocab_size, hidden, std=1.0),
        "model.norm.weight": norm(),
        # Each logit is then normal with this standard deviation.
        "lm_head.weight": linear(vocab_size, hidden, gain=5.0 * head_scale),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.post_attention_layernorm.weight": norm(),
            # Sharp attention: an average over many positions would be the same everywhere.
            f"{layer}.self_attn.q_proj.weight": linear(q_size, hidden, gain=1.7),
            f"{layer}.self_attn.k_proj.weight": linear(kv_size, hidden, gain=1.7),
            f"{layer}.self_attn.v_proj.weight": linear(kv_size, hidden, gain=1.5),
            f"{layer}.self_attn.o_proj.weight": linear(hidden, q_size, gain=1.5),
            f"{layer}.mlp.gate_proj.weight": linear(intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": linear(intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": linear(hidden, intermediate),
        }
        if head_dim is not None:
            for name in ("q_norm", "k_norm"):
                weights[f"{layer}.self_attn.{name}.weight"] = norm(head_dim, 1.7)
        if qkv_bias:
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                weights[f"{layer}.self_attn.{name}_proj.bias"] = normal(size, std=0.2)
    return weights


def _toy_name(name: str) -> str:
    if ".self_attn." not in name:
        return name
    return name.replace("model.layers", "decoder.layers").replace("self_attn", "attention")


def _olmo_name(name: str) -> str:
    stem, _, parameter = name.rpartition(".")
    if stem in _OLMO_TOP_NAMES:
        return f"{_OLMO_TOP_NAMES[stem]}.{parameter}"
    _, _, index, part = stem.split(".", 3)
    return f"model.transformer.blocks.{index}.{_OLMO_LAYER_NAMES[part]}.{parameter}"


def _llama_name(name: str) -> str:
    stem, _, parameter = name.rpartition(".")
    top = {olmo: llama for llama, olmo in _OLMO_TOP_NAMES.items()}
    if stem in top:
        return f"{top[stem]}.{parameter}"
    _, _, _, index, part = stem.split(".", 4)
    layer = {olmo: llama for llama, olmo in _OLMO_LAYER_NAMES.items()}
    return f"model.layers.{index}.{layer[part]}.{parameter}"


def _write(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    d2f: dict[str, Any] | None,
    shards: int,
    dtype: torch.dtype,
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if d2f is not None:
        config = {**config, "d2f": d2f}
    _dump(path / "config.json", config)
    _dump(
        path / "generation_config.json",
        {
            "_from_model_config": True,
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": config["pad_token_id"],
            "transformers_version": config["transformers_version"],
        },
    )
    weights = {name: weights[name].to(dtype).contiguous() for name in sorted(weights)}
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * size : (i + 1) * size]
        save_file({name: weights[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    _dump(
        path / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def byte_level_vocab(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-level BPE vocabulary of exactly `size` entries, and its merges.

    Bytes come first (printable ASCII where all 256 do not fit), then pairs of letters, then
    entries that no text yields, as in the padded tail of a real vocabulary.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < 256:
        # "Ġ" and "Ċ" are the byte-level spellings of space and line feed.
        alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    assert len(alphabet) <= size, f"a byte-level vocabulary needs {len(alphabet)} entries"
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    pairs = [(a, b) for total in range(51) for a, b in _letter_pairs(letters, total)]
    merges = pairs[: size - len(alphabet)]
    tokens = [*alphabet, *(a + b for a, b in merges)]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    return {token: index for index, token in enumerate(tokens)}, merges


def _letter_pairs(letters: str, total: int) -> list[tuple[str, str]]:
    """Return pairs whose letters' ranks add up to `total`: frequent letters pair first."""
    ranks = range(max(0, total - len(letters) + 1), min(total, len(letters) - 1) + 1)
    return [(letters[i], letters[total - i]) for i in ranks]


def _added_tokens(vocab_size: int) -> dict[int, str]:
    return {vocab_size - 2: MASK_TOKEN, vocab_size - 1: END_TOKEN}


def _tokenizer_config(vocab_size: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(token_id): {"content": token, **flags, "special": True}
            for token_id, token in _added_tokens(vocab_size).items()
        },
        "bos_token": None,
        "chat_template": (
            "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        ),
        "clean_up_tokenization_spaces": False,
        "eos_token": END_TOKEN,
        "mask_token": MASK_TOKEN,
        "model_max_length": 1024,
        "pad_token": END_TOKEN,
        "unk_token": None,
    }


def write_dream_tokenizer(path: str | Path, vocab_size: int) -> None:
    """Write Dream's layout: vocab.json and merges.txt, a tokenizer class that is remote code."""
    path = Path(path)
    vocab, merges = byte_level_vocab(vocab_size - 2)
    _dump(path / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = _tokenizer_config(vocab_size)
    config["add_prefix_space"] = False
    config["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    config["errors"] = "replace"
    config["split_special_tokens"] = False
    config["tokenizer_class"] = "DreamTokenizer"
    _dump(path / "tokenizer_config.json", config)


def write_llada_tokenizer(path: str | Path, vocab_size: int) -> None:
    """Write LLaDA's layout: tokenizer.json, the generic fast tokenizer class."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path = Path(path)
    vocab, merges = byte_level_vocab(vocab_size - 2)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in _added_tokens(vocab_size).values()]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = _tokenizer_config(vocab_size)
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _dump(path / "tokenizer_config.json", config)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
