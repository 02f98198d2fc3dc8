# SPDX-License-Identifier: Apache-2.0
"""LLaDA: Llama's layers under OLMo's field and tensor names."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from vllm_d2f.models.config import MAX_SIZES, D2FConfig, Switches, check_equal, check_int
from vllm_d2f.models.family import Family, Published

__all__ = ["FAMILY", "LLaDAConfig"]

# OLMo's field names, which LLaDA's config.json uses -> Llama's.
_LLAMA_NAME_OF = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "activation_type": "hidden_act",
    "weight_tying": "tie_word_embeddings",
}

# OLMo's switches, with the values that describe a Llama stack. Null is OLMo's "off".
_OLMO_SWITCHES: Switches = {
    "alibi": ((False, None), "positions are rotary"),
    "rope": ((True,), "positions are rotary"),
    "block_type": (("llama",), "only the Llama block is implemented"),
    "block_group_size": ((1, None), "blocks are not grouped"),
    "include_bias": ((False, None), "no layer has a bias"),
    "include_qkv_bias": ((False, None), "no layer has a bias"),
    "attention_layer_norm": ((False, None), "queries and keys are not normalised"),
    "input_emb_norm": ((False, None), "embeddings are not normalised"),
    "layer_norm_type": (("rms",), "the norm is RMSNorm"),
    "layer_norm_with_affine": ((True,), "the norm has a weight"),
    "bias_for_layer_norm": ((False, None), "the norm has no bias"),
    "multi_query_attention": ((False, None), "give n_kv_heads instead"),
    "scale_logits": ((False, None), "logits are not scaled"),
    "clip_qkv": ((None,), "queries, keys and values are not clipped"),
}


@strict
class LLaDAConfig(D2FConfig, LlamaConfig):
    """`model_type: "llada"`."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = _LLAMA_NAME_OF
    switches: ClassVar[Switches] = _OLMO_SWITCHES

    vocab_size: int = 126464
    intermediate_size: int = 12288
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def check_layout(self, extra: dict[str, Any]) -> None:
        self._adopt_olmo_names(extra)
        super().check_layout(extra)

    def _adopt_olmo_names(self, extra: dict[str, Any]) -> None:
        """Move OLMo's fields to Llama's names, before anything is derived from them."""
        mlp_ratio = extra.pop("mlp_ratio", None)
        if extra.get("mlp_hidden_size", 0) is None:
            # OLMo's default when the size is null.
            d_model = check_int("d_model", extra.get("d_model"), 1, MAX_SIZES["hidden_size"])
            extra["mlp_hidden_size"] = check_int("mlp_ratio", mlp_ratio, 1, 1024) * d_model
        self.adopt_names(extra)
        embedding_size = extra.pop("embedding_size", None)
        if embedding_size is not None:
            # More rows than tokens would put logits without a token into the softmax.
            check_equal("embedding_size", embedding_size, (self.vocab_size,), "it is vocab_size")


FAMILY = Family(
    name="llada",
    architecture="LLaDAModelLM",
    config=LLaDAConfig,
    stack="vllm.model_executor.models.llama:LlamaForCausalLM",
    hf="LlamaForCausalLM",
    tensor_names={
        "model.transformer.wte": "model.embed_tokens",
        "model.transformer.ln_f": "model.norm",
        "model.transformer.ff_out": "lm_head",
        "model.transformer.blocks.*.attn_norm": "model.layers.*.input_layernorm",
        "model.transformer.blocks.*.ff_norm": "model.layers.*.post_attention_layernorm",
        "model.transformer.blocks.*.q_proj": "model.layers.*.self_attn.q_proj",
        "model.transformer.blocks.*.k_proj": "model.layers.*.self_attn.k_proj",
        "model.transformer.blocks.*.v_proj": "model.layers.*.self_attn.v_proj",
        "model.transformer.blocks.*.attn_out": "model.layers.*.self_attn.o_proj",
        "model.transformer.blocks.*.ff_proj": "model.layers.*.mlp.gate_proj",
        "model.transformer.blocks.*.up_proj": "model.layers.*.mlp.up_proj",
        "model.transformer.blocks.*.ff_out": "model.layers.*.mlp.down_proj",
    },
    mask_token_id=126336,
    # <|eot_id|>, which ends a turn of the instruct model; config.json names <|endoftext|> only.
    extra_end_token_ids=(126348,),
    # The published settings, the paper's table 8.
    presets={
        "gsm8k": dict(block_size=64, tau_add=0.7, tau_act=0.95, tau_conf=0.90),
        "mbpp": dict(block_size=32, tau_add=0.9, tau_act=0.95, tau_conf=0.90),
        "math": dict(block_size=32, tau_add=0.1, tau_act=0.95, tau_conf=0.90),
        "humaneval": dict(block_size=32, tau_add=0.1, tau_act=0.95, tau_conf=0.90),
    },
    published={
        "d2f-llada-8b": Published(
            about="D2F-LLaDA-8B-Instruct",
            base="GSAI-ML/LLaDA-8B-Instruct",
            adapter="SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora",
            variant="instruct",
            gigabytes=16.1,
            licence="mit",
            d2f={"preset": "llada-gsm8k"},
        ),
    },
)
