# SPDX-License-Identifier: Apache-2.0
"""Stable-DiffCoder: Llama's layers, names and configuration, with a mask token.

Its `generate_block` decodes one block at a time and cuts the last one where the answer ends.
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
    other_model_types=("llama",),
    mask_token_id=5,
    prompt_attention="block_causal",
    block_origin="zero",
    # The defaults of its own `generate_block`. It accepts a probability of 0.95, too, which is the
    # next float32 after this threshold.
    presets={
        "default": dict(block_size=4, max_blocks=1, tau_conf=0.9499999, cut_last_block=1),
    },
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
