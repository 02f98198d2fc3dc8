# SPDX-License-Identifier: Apache-2.0
"""Stable-DiffCoder: Llama's layers, names and configuration, with a mask token.

The published config.json says `model_type: "llama"`, which is transformers' own. A name's folder
(`hub.prepare`) says "stable_diffcoder", so that the checks of a D2F config run.
"""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from vllm_d2f.models.config import D2FConfig
from vllm_d2f.models.family import Family, Published

__all__ = ["FAMILY", "StableDiffcoderConfig"]


@strict
class StableDiffcoderConfig(D2FConfig, LlamaConfig):
    """`model_type: "stable_diffcoder"`."""

    model_type = "stable_diffcoder"
    free_head_dim = True

    vocab_size: int = 155136


FAMILY = Family(
    name="stable_diffcoder",
    architecture="StableDiffcoderForCausalLM",
    config=StableDiffcoderConfig,
    stack="vllm.model_executor.models.llama:LlamaForCausalLM",
    hf="LlamaForCausalLM",
    mask_token_id=5,
    prompt_attention="block_causal",
    block_origin="zero",
    # The defaults of its own `generate_block`.
    presets={"default": dict(block_size=4, max_blocks=1, tau_conf=0.95)},
    published={
        "stable-diffcoder-8b": Published(
            about="Stable-DiffCoder-8B-Instruct",
            base="ByteDance-Seed/Stable-DiffCoder-8B-Instruct",
            gigabytes=16.5,
            licence="mit",
            d2f={"preset": "stable_diffcoder-default"},
        ),
    },
)
