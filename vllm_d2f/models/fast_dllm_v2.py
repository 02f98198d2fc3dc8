# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5's layers and tensor names, blocks from position 0.

The output at i - 1 predicts position i. A block's first token is the one that the output of the
block before it predicts once that block is complete, whatever its probability; then the sub-blocks
of the block are decoded one after the other. With two open blocks and tau_add 1, the forward that
commits a block gives the first token of the next one, as the published loop does.
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from vllm_d2f.models.config import D2FConfig
from vllm_d2f.models.family import Family, Published

__all__ = ["FAMILY", "FastDLLMv2Config"]


@strict
class FastDLLMv2Config(D2FConfig, Qwen2Config):
    """`model_type: "Fast_dLLM_Qwen"`."""

    model_type = "Fast_dLLM_Qwen"


def _published(size: str, gigabytes: float) -> Published:
    name = f"Fast_dLLM_v2_{size}"
    d2f = {"preset": "fast_dllm_v2-default"}
    return Published(
        name, f"Efficient-Large-Model/{name}", gigabytes, licence="apache-2.0", d2f=d2f
    )


FAMILY = Family(
    name="fast_dllm_v2",
    architecture="Fast_dLLM_QwenForCausalLM",
    config=FastDLLMv2Config,
    stack="vllm.model_executor.models.qwen2:Qwen2ForCausalLM",
    hf="Qwen2ForCausalLM",
    mask_token_id=151665,
    logits_shift="previous",
    prompt_attention="block_causal",
    block_origin="zero",
    # The model card's threshold; sub-blocks of 8 are the default of its `generate`.
    presets={
        "default": dict(block_size=32, max_blocks=2, tau_add=1.0, tau_conf=0.9, sub_block_size=8),
    },
    published={
        "fast-dllm-v2-1.5b": _published("1.5B", 3.6),
        "fast-dllm-v2-7b": _published("7B", 15.3),
    },
)
