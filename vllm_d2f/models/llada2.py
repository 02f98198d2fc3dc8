# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0 (arXiv 2512.15745): a mixture of experts on GLM-4.5's layers, under Ling's names.

The layers are GLM-4.5's to the letter: a sigmoid router in groups with a bias per expert, a shared
expert, dense first layers, norms of queries and keys, a rotary embedding of some channels. vLLM's
`bailing_moe` has Ling's names but no twin in transformers, which the reference needs.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Glm4MoeConfig

from vllm_d2f.models.config import D2FConfig, Switches, check_equal, check_experts
from vllm_d2f.models.family import Family, Published

__all__ = ["FAMILY", "LLaDA2MoeConfig"]

_T2T = "LLaDA2.1 edits decoded tokens, which D2F never changes"
_EDITS = "LLaDA2.2 inserts and deletes decoded tokens, which D2F never changes"


@strict
class LLaDA2MoeConfig(D2FConfig, Glm4MoeConfig):
    """`model_type: "llada2_moe"`."""

    model_type = "llada2_moe"
    attribute_map: ClassVar[dict[str, str]] = Glm4MoeConfig.attribute_map | {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
    }
    free_head_dim = True
    partial_rotary = True
    switches: ClassVar[Switches] = {
        "use_bias": ((None, False), "no layer has a bias"),
        "use_qkv_bias": ((None, False), "no layer has a bias"),
        "norm_head": ((None, False), "the head is not normalised"),
        "norm_softmax": ((None, False), "the softmax is the usual one"),
        "use_rmsnorm": ((None, True), "the norm is RMSNorm"),
        "score_function": ((None, "sigmoid"), "the router's scores are sigmoids"),
        "moe_router_enable_expert_bias": ((None, True), "the router has a bias per expert"),
        "router_dtype": ((None, "fp32"), "the router computes in float32"),
        "delete_token_id": ((None,), _EDITS),
        "split_token_id": ((None,), _EDITS),
    }

    vocab_size: int = 157184
    head_dim: int = 128
    use_qk_norm: bool = True
    num_mtp_layers: int = 0

    def check_layout(self, extra: dict[str, Any]) -> None:
        self.adopt_names(extra)
        super().check_layout(extra)
        check_experts(self, "n_routed_experts", n_group=1, topk_group=1, first_k_dense_replace=0)
        check_equal("use_qk_norm", self.use_qk_norm, (True,), "queries and keys are normalised")
        check_equal("norm_topk_prob", self.norm_topk_prob, (True,), "weights of experts add up")
        check_equal("num_nextn_predict_layers", self.num_mtp_layers, (0,), "no layer predicts more")
        shared = self.n_shared_experts * self.moe_intermediate_size
        size = "moe_shared_expert_intermediate_size"
        check_equal(size, extra.pop(size, None), (None, shared), "other sizes determine it")


FAMILY = Family(
    name="llada2",
    architecture="LLaDA2MoeModelLM",
    config=LLaDA2MoeConfig,
    stack="vllm.model_executor.models.glm4_moe:Glm4MoeForCausalLM",
    hf="Glm4MoeForCausalLM",
    tensor_names={
        "model.word_embeddings": "model.embed_tokens",
        "model.layers.*.attention.query_key_value": "model.layers.*.self_attn.qkv_proj",
        "model.layers.*.attention.query_layernorm": "model.layers.*.self_attn.q_norm",
        "model.layers.*.attention.key_layernorm": "model.layers.*.self_attn.k_norm",
        "model.layers.*.attention.dense": "model.layers.*.self_attn.o_proj",
        "model.layers.*.mlp.gate.expert_bias": "model.layers.*.mlp.gate.e_score_correction_bias",
    },
    mask_token_id=156895,
    # <|role_end|>, which config.json names as the padding only.
    extra_end_token_ids=(156892,),
    prompt_attention="block_causal",
    block_origin="zero",
    # A parameter of LLaDA2.1's `generate`. Its config.json does not differ from LLaDA2.0's.
    foreign_code={"editing_threshold": _T2T},
    # The defaults of LLaDA2.0's own `generate`, and MBD's (arXiv 2606.29215).
    presets={
        "default": dict(block_size=32, max_blocks=1, tau_conf=0.95),
        "mbd": dict(block_size=32, max_blocks=2, tau_add=0.1, tau_act=0.9, tau_conf=0.95),
    },
    published={
        "llada2-mini": Published(
            about="LLaDA2.0-mini, 16B with 1.4B active",
            base="inclusionAI/LLaDA2.0-mini",
            gigabytes=32.5,
            licence="apache-2.0",
            d2f={"preset": "llada2-default", "window": 64},
        ),
        "mbd-llada2-mini": Published(
            about="MBD-Math-LLaDA2-mini, 16B with 1.4B active",
            base="SJTU-DENG-Lab/MBD-Math-LLaDA2-mini",
            gigabytes=32.5,
            licence="mit",
            d2f={"preset": "llada2-mbd"},
        ),
    },
)
