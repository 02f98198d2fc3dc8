# SPDX-License-Identifier: Apache-2.0
"""Dream: Qwen2's layers and tensor names, with a mask token and shifted logits."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2Tokenizer

from vllm_d2f.models.config import D2FConfig
from vllm_d2f.models.family import Family, Published

__all__ = ["FAMILY", "DreamConfig", "DreamTokenizer"]


@strict
class DreamConfig(D2FConfig, Qwen2Config):
    """`model_type: "Dream"`."""

    model_type = "Dream"

    vocab_size: int = 152064
    max_position_embeddings: int = 131072


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE, under the class name that Dream's checkpoints ask for.

    Dream's own `DreamTokenizer` is a copy of Qwen2's slow tokenizer published as remote code; its
    two extra tokens (begin of text, mask) are listed in `added_tokens_decoder` and need no code.
    """


def _published(
    model: str, base: str, variant: str, preset: str = "dream-gsm8k", licence: str = "apache-2.0"
) -> Published:
    return Published(
        about=f"D2F-{model}",
        base=base,
        adapter=f"SJTU-Deng-Lab/D2F_{model.replace('-', '_')}_Lora",
        variant=variant,
        gigabytes=15.3,
        licence=licence,
        d2f={"preset": preset},
        # Dream was adapted from Qwen2.5 at this length; its config.json still says 131072, which
        # would size a server for prompts that the model cannot answer.
        context=2048,
    )


FAMILY = Family(
    name="dream",
    architecture="DreamModel",
    config=DreamConfig,
    stack="vllm.model_executor.models.qwen2:Qwen2ForCausalLM",
    hf="Qwen2ForCausalLM",
    tokenizer=DreamTokenizer,
    mask_token_id=151666,
    # As in the autoregressive model that Dream was adapted from.
    logits_shift="previous",
    aliases=("diffucoder",),
    # The published settings, the paper's table 8.
    presets={
        "gsm8k": dict(block_size=32, tau_add=0.1, tau_act=0.95, tau_conf=0.90),
        "mbpp": dict(block_size=48, tau_add=0.1, tau_act=0.95, tau_conf=0.90),
        "math": dict(block_size=64, tau_add=0.1, tau_act=0.95, tau_conf=0.90),
        "humaneval": dict(block_size=32, tau_add=0.9, tau_act=0.95, tau_conf=0.95),
    },
    published={
        "d2f-dream-7b": _published("Dream-Base-7B", "Dream-org/Dream-v0-Base-7B", "base"),
        "d2f-dream-instruct-7b": _published(
            "Dream-Instruct-7B", "Dream-org/Dream-v0-Instruct-7B", "instruct"
        ),
        "d2f-diffucoder-7b": _published(
            "DiffuCoder-Instruct-7B",
            "apple/DiffuCoder-7B-Instruct",
            "instruct",
            preset="dream-humaneval",
            licence="apple-amlr",
        ),
    },
)
