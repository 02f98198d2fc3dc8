# SPDX-License-Identifier: Apache-2.0
"""A model family from another package: Qwen3's layers, blocks from position 0 on.

It uses nothing but what such a package may use: `Family`, `D2FConfig`, `vllm_d2f.register` and an
entry point of the group `vllm.general_plugins` (the folder beside this file).
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

import vllm_d2f
from vllm_d2f.models.config import D2FConfig
from vllm_d2f.models.family import Family


@strict
class ToyQwen3Config(D2FConfig, Qwen3Config):
    """`model_type: "toy_qwen3"`."""

    model_type = "toy_qwen3"
    free_head_dim = True


FAMILY = Family(
    name="toy",
    architecture="ToyQwen3ForCausalLM",
    config=ToyQwen3Config,
    stack="vllm.model_executor.models.qwen3:Qwen3ForCausalLM",
    hf="Qwen3ForCausalLM",
    tensor_names={"decoder.layers.*.attention": "model.layers.*.self_attn"},
    prompt_attention="block_causal",
    block_origin="zero",
    presets={"b4": dict(block_size=4, max_blocks=1, tau_conf=0.9)},
)


def register() -> None:
    """Register the family. vLLM calls this entry point in each of its processes."""
    vllm_d2f.register(FAMILY)
