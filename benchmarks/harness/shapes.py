# SPDX-License-Identifier: Apache-2.0
"""Configs of 7B, 8B and 70B models in their official layouts, to be filled with dummy weights.

`shapes.json` has the sizes of the published config.json files. Without a tokenizer and weights:
`load_format="dummy"`, `skip_tokenizer_init=True`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

SHAPES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
)
"""dream: Dream-v0-Base-7B; llada: LLaDA-8B-Instruct; qwen: Qwen2.5-7B; llama: Llama-3-8B; llama70b:
Llama-3-70B."""
SHAPES["qwen"] = SHAPES["dream"] | SHAPES["qwen"]
SHAPES["llama70b"] = SHAPES["llama"] | SHAPES["llama70b"]
for only_dream in ("mask_token_id", "pad_token_id", "rope_scaling"):
    del SHAPES["qwen"][only_dream]

D2F = {"dream": "qwen", "llada": "llama"}
"""The shapes that decode with D2F, and the autoregressive shape that each is compared with."""

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "mlp_hidden_size"), 128),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 2),
    **dict.fromkeys(("vocab_size", "embedding_size"), 512),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 510),
    **{"num_key_value_heads": 1, "mask_token_id": 511},
}
"""In place of the real ones in a rehearsal. Heads of 32 are the least of vLLM's CPU kernel."""


def write(folder: Path, name: str, small: bool = False) -> Path:
    """Write the config of a shape and return its folder."""
    config = dict(SHAPES[name])
    if small:
        config |= {key: value for key, value in SMALL.items() if key in config}
    target = folder / f"{name}{'-small' if small else ''}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return target


class Sizes(NamedTuple):
    """The sizes of a shape that decide what a step costs."""

    hidden: int
    heads: int
    key_heads: int
    layers: int
    mlp: int


def sizes(name: str) -> Sizes:
    """Read the sizes off a shape's config, whatever its family calls them."""
    llada = "d_model n_heads n_kv_heads n_layers mlp_hidden_size"
    others = "hidden_size num_attention_heads num_key_value_heads num_hidden_layers"
    keys = llada if name == "llada" else f"{others} intermediate_size"
    return Sizes(*(SHAPES[name][key] for key in keys.split()))


def weight_bytes(name: str) -> dict[str, int]:
    """Return the bytes in bfloat16 that a step reads, and those of the head among them.

    The embedding is looked up, not read; norms are left out.
    """
    hidden, heads, kv, layers, mlp = sizes(name)
    attention = hidden * hidden * 2 + 2 * hidden * hidden * kv // heads
    head = hidden * SHAPES[name]["vocab_size"]
    return {"step": 2 * (layers * (attention + 3 * hidden * mlp) + head), "head": 2 * head}


def kv_bytes_per_token(name: str) -> int:
    """Return the bytes of a token's keys and values in a bfloat16 cache, over all layers."""
    hidden, heads, kv, layers, _ = sizes(name)
    return 2 * 2 * layers * hidden * kv // heads
