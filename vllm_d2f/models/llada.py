# SPDX-License-Identifier: Apache-2.0
"""LLaDA: vLLM's Llama stack behind OLMo's tensor names."""

import re
from collections.abc import Iterable

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_d2f.models.base import D2FModel

__all__ = ["OLMO_TO_LLAMA", "LLaDAForD2F"]

# Anchored at both ends: `ff_out` is the LM head under `transformer` and the MLP's down projection
# under a block. Names end before the parameter's own name or at the end of the string, because
# quantization configs and LoRA adapters name modules.
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
OLMO_TO_LLAMA = WeightsMapper(
    orig_to_new_regex={
        re.compile(rf"^model\.transformer\.{old}(?=\.|$)"): new for old, new in _RENAMES.items()
    }
)


class LLaDAForD2F(D2FModel, LlamaForCausalLM):  # type: ignore[misc]
    """Architecture `LLaDAModelLM`. Position i is predicted by the output at i."""

    hf_to_vllm_mapper = OLMO_TO_LLAMA | LlamaForCausalLM.hf_to_vllm_mapper

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load OLMo-named tensors; Llama-named ones pass unchanged."""
        # The inner model stacks q/k/v and gate/up itself, so only the renames are applied here.
        return AutoWeightsLoader(self).load_weights(weights, mapper=OLMO_TO_LLAMA)
