# SPDX-License-Identifier: Apache-2.0
"""Configs of 7B and 8B models in their official layouts, to be filled with dummy weights.

Sizes are those of the published config.json files. Without a tokenizer and weights:
`load_format="dummy"`, `skip_tokenizer_init=True`.
"""

import json
from pathlib import Path
from typing import Any

_QWEN2_7B: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

SHAPES: dict[str, dict[str, Any]] = {
    "dream": {
        **_QWEN2_7B,
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "mask_token_id": 151666,
        "pad_token_id": 151643,
        "rope_scaling": None,
    },
    "llada": {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 4096,
        "embedding_size": 126464,
        "eos_token_id": 126081,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 126336,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 12288,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "pad_token_id": 126081,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": 126464,
        "weight_tying": False,
    },
    "qwen": {**_QWEN2_7B, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
}
"""dream: Dream-v0-Base-7B; llada: LLaDA-8B-Instruct; qwen: Qwen2.5-7B; llama: Llama-3-8B."""

D2F = ("dream", "llada")
"""Those that decode with D2F; the others stand beside them."""

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "d_model": 64,
    "mlp_hidden_size": 128,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "vocab_size": 512,
    "embedding_size": 512,
    "mask_token_id": 511,
    "eos_token_id": 510,
    "bos_token_id": 510,
    "pad_token_id": 510,
}
"""In place of the real ones in a rehearsal. Heads of 32 are the least of vLLM's CPU kernel."""


def write(folder: Path, name: str, small: bool = False) -> Path:
    """Write the config of a shape; returns its folder."""
    config = dict(SHAPES[name])
    if small:
        config |= {key: value for key, value in SMALL.items() if key in config}
    target = folder / f"{name}{'-small' if small else ''}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return target


def weight_bytes(name: str) -> dict[str, int]:
    """Bytes in bfloat16 that a step reads, and those of the head among them.

    The embedding is looked up, not read; norms are left out.
    """
    c = SHAPES[name]
    llada = name == "llada"
    hidden = c["d_model" if llada else "hidden_size"]
    heads = c["n_heads" if llada else "num_attention_heads"]
    kv = c["n_kv_heads" if llada else "num_key_value_heads"]
    layers = c["n_layers" if llada else "num_hidden_layers"]
    mlp = c["mlp_hidden_size" if llada else "intermediate_size"]
    attention = hidden * hidden * 2 + 2 * hidden * hidden * kv // heads
    head = hidden * c["vocab_size"]
    return {"step": 2 * (layers * (attention + 3 * hidden * mlp) + head), "head": 2 * head}


def kv_bytes_per_token(name: str) -> int:
    """Of a bfloat16 cache, all layers."""
    c = SHAPES[name]
    if name == "llada":
        return 2 * 2 * c["n_layers"] * c["d_model"] * c["n_kv_heads"] // c["n_heads"]
    size = c["hidden_size"] // c["num_attention_heads"]
    return 2 * 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * size
