# SPDX-License-Identifier: Apache-2.0
"""LLaDA's tensor names, which are OLMo's, and Llama's. Imports nothing of vLLM."""

import re

__all__ = ["LLAMA_OF_OLMO", "to_llama", "to_olmo"]

# Below `model.transformer.`. Each pattern must end where the module's name ends: `ff_out` is the LM
# head under `transformer` and the MLP's down projection under a block.
_RENAMES = {
    r"wte": "model.embed_tokens",
    r"ln_f": "model.norm",
    r"ff_out": "lm_head",
    r"blocks\.(\d+)\.attn_norm": r"model.layers.\1.input_layernorm",
    r"blocks\.(\d+)\.ff_norm": r"model.layers.\1.post_attention_layernorm",
    r"blocks\.(\d+)\.([qkv]_proj)": r"model.layers.\1.self_attn.\2",
    r"blocks\.(\d+)\.attn_out": r"model.layers.\1.self_attn.o_proj",
    r"blocks\.(\d+)\.ff_proj": r"model.layers.\1.mlp.gate_proj",
    r"blocks\.(\d+)\.up_proj": r"model.layers.\1.mlp.up_proj",
    r"blocks\.(\d+)\.ff_out": r"model.layers.\1.mlp.down_proj",
}

# Names end before the parameter's own name or at the end of the string, because quantization
# configs and LoRA adapters name modules.
LLAMA_OF_OLMO: dict[re.Pattern[str], str] = {
    re.compile(rf"^model\.transformer\.{old}(?=\.|$)"): new for old, new in _RENAMES.items()
}

_OLMO_OF_LLAMA = {
    r"model\.embed_tokens": "wte",
    r"model\.norm": "ln_f",
    r"lm_head": "ff_out",
    r"model\.layers\.(\d+)\.input_layernorm": r"blocks.\1.attn_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"blocks.\1.ff_norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv]_proj)": r"blocks.\1.\2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blocks.\1.attn_out",
    r"model\.layers\.(\d+)\.mlp\.gate_proj": r"blocks.\1.ff_proj",
    r"model\.layers\.(\d+)\.mlp\.up_proj": r"blocks.\1.up_proj",
    r"model\.layers\.(\d+)\.mlp\.down_proj": r"blocks.\1.ff_out",
}


def to_llama(name: str) -> str:
    """Llama's name of an OLMo-named tensor or module; other names pass unchanged."""
    for old, new in LLAMA_OF_OLMO.items():
        name, count = old.subn(new, name)
        if count:
            break
    return name


def to_olmo(name: str) -> str:
    """OLMo's name of a Llama-named tensor or module; other names pass unchanged."""
    for old, new in _OLMO_OF_LLAMA.items():
        renamed, count = re.subn(rf"^{old}(?=\.|$)", rf"model.transformer.{new}", name)
        if count:
            return renamed
    return name
