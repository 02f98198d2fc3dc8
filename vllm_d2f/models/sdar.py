# SPDX-License-Identifier: Apache-2.0
"""SDAR (arXiv 2510.06303), dense and mixture of experts: Qwen3's layers, names and tokenizer.

TraDo and MBD-SDAR (arXiv 2606.29215) are checkpoints of this layout. DreamReasoner (arXiv
2606.19257) has it too, under names of its own.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config, Qwen3MoeConfig

from vllm_d2f.models.config import D2FConfig, check_experts
from vllm_d2f.models.family import Family, Published

__all__ = ["FAMILIES", "DreamReasonerConfig", "SDARConfig", "SDARMoeConfig"]


@strict
class SDARConfig(D2FConfig, Qwen3Config):
    """`model_type: "sdar"`."""

    model_type = "sdar"
    free_head_dim = True


@strict
class SDARMoeConfig(D2FConfig, Qwen3MoeConfig):
    """`model_type: "sdar_moe"`."""

    model_type = "sdar_moe"
    free_head_dim = True

    head_dim: int = 128

    def check_layout(self, extra: dict[str, Any]) -> None:
        super().check_layout(extra)
        check_experts(self, "num_experts")


@strict
class DreamReasonerConfig(SDARConfig):
    """`model_type: "dream_reasoner"`; the published one is Dream's."""

    model_type = "dream_reasoner"


# The first two are `low_confidence_dynamic` of SDAR's generate.py, the others MBD's.
_PRESETS = {
    "default": dict(block_size=4, max_blocks=1, tau_conf=0.85),
    "b32": dict(block_size=32, max_blocks=1, tau_conf=0.85),
    "mbd": dict(block_size=32, max_blocks=4, tau_add=0.1, tau_act=0.9, tau_conf=0.95),
    "mbd-b4": dict(block_size=4, max_blocks=4, tau_add=0.1, tau_act=0.25, tau_conf=0.95),
}


def _family(
    name: str, architecture: str, stack: str, config: type[D2FConfig], **more: Any
) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        config=config,
        stack=f"vllm.model_executor.models.{stack.replace('M', '_m').lower()}:{stack}ForCausalLM",
        hf=f"{stack}ForCausalLM",
        mask_token_id=151669,
        # <|im_end|>, which ends a turn of the chat models; config.json names <|endoftext|> only.
        extra_end_token_ids=(151645,),
        prompt_attention="block_causal",
        block_origin="zero",
        **{"presets": _PRESETS} | more,
    )


def _published(base: str, gigabytes: float, preset: str = "sdar-default") -> Published:
    # The window leaves a request room for the presets with several open blocks.
    d2f = {"preset": preset, "window": 128}
    return Published(base.partition("/")[2], base, gigabytes, licence="mit", d2f=d2f)


FAMILIES = (
    _family(
        "sdar",
        "SDARForCausalLM",
        "Qwen3",
        SDARConfig,
        published={
            "sdar-1.7b": _published("JetLM/SDAR-1.7B-Chat", 4.1),
            "sdar-4b": _published("JetLM/SDAR-4B-Chat", 8.8),
            "sdar-8b": _published("JetLM/SDAR-8B-Chat", 16.4),
            "mbd-sdar-8b": _published("SJTU-DENG-Lab/MBD-Math-SDAR-8B-Chat-b32", 16.4, "sdar-mbd"),
        },
    ),
    _family("sdar_moe", "SDARMoeForCausalLM", "Qwen3Moe", SDARMoeConfig),
    _family(
        "dream_reasoner",
        "DreamForCausalLM",
        "Qwen3",
        DreamReasonerConfig,
        other_model_types=("Dream",),
        # The defaults of its own `block_diffusion_generate`. Its `force_accept` finds no more
        # positions in a block's last step than `min_per_step` takes anyway.
        presets={"default": dict(block_size=32, max_blocks=1, tau_conf=0.9)},
    ),
)
