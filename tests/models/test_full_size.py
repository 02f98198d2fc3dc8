# SPDX-License-Identifier: Apache-2.0
"""Published sizes on the meta device: vLLM's stacks take every tensor, in name and shape.

The configurations are the published ones; the names and shapes of the tensors are written out here
from the authors' model code, because the published indices cannot be downloaded in a test.
"""

import json

import pytest
import torch
from test_weights import class_of, one_rank  # noqa: F401
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config

QWEN3 = dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
    head_dim=128, hidden_act="silu", initializer_range=0.02, max_position_embeddings=32768,
    rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
    vocab_size=151936, debug=False, ep_size=1, fuse_cross_entropy=True, micro_forward=False,
    skip_checkpoint=False, use_deepep=False, attn_implementation="flex_attention",
)  # fmt: skip
CONFIGS = {
    "SDAR-4B-Chat": QWEN3 | dict(
        architectures=["SDARForCausalLM"], model_type="sdar", hidden_size=2560,
        intermediate_size=9728, num_attention_heads=32, num_hidden_layers=36,
        num_key_value_heads=8,
    ),
    "SDAR-30B-A3B-Chat": QWEN3 | dict(
        architectures=["SDARMoeForCausalLM"], model_type="sdar_moe", hidden_size=2048,
        intermediate_size=6144, num_attention_heads=32, num_hidden_layers=48,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "DreamReasoner-8B": QWEN3 | dict(
        architectures=["DreamForCausalLM"], model_type="Dream", block_size=32,
        hidden_size=4096, intermediate_size=12288, mask_token_id=151669, num_attention_heads=32,
        num_hidden_layers=36, num_key_value_heads=8,
    ),
    "LLaDA2.0-mini": dict(
        architectures=["LLaDA2MoeModelLM"], model_type="llada2_moe", dtype="bfloat16",
        first_k_dense_replace=1, head_dim=128, hidden_act="silu", hidden_size=2048,
        intermediate_size=5120, max_position_embeddings=32768, moe_intermediate_size=512,
        moe_router_enable_expert_bias=True, n_group=8, norm_head=False, norm_topk_prob=True,
        num_attention_heads=16, num_experts=256, num_experts_per_tok=8, num_hidden_layers=20,
        num_key_value_heads=4, num_shared_experts=1, output_router_logits=False,
        pad_token_id=156892, partial_rotary_factor=0.5, rms_norm_eps=1e-6, rope_theta=600000,
        rotary_dim=64, routed_scaling_factor=2.5, router_dtype="fp32", score_function="sigmoid",
        tie_word_embeddings=False, topk_group=4, use_qk_norm=True, use_qkv_bias=False,
        vocab_size=157184,
    ),
    "Fast_dLLM_v2_7B": dict(
        architectures=["Fast_dLLM_QwenForCausalLM"], model_type="Fast_dLLM_Qwen",
        attention_dropout=0.0, bd_size=32, bos_token_id=151643, conplemenrary_mask=True,
        eos_token_id=151645, hidden_act="silu", hidden_size=3584, intermediate_size=18944,
        layer_types=["full_attention"] * 28, max_position_embeddings=32768, max_window_layers=28,
        num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, pad_token_id=151645,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", use_sliding_window=False,
        vocab_size=152064,
    ),
    "Stable-DiffCoder-8B-Instruct": dict(
        architectures=["StableDiffcoderForCausalLM"], model_type="llama",
        attention_bias=False, attention_dropout=0.1, bos_token_id=0, eos_token_id=2,
        hidden_act="silu", hidden_size=4096, intermediate_size=14336, layer_norm_eps=None,
        max_position_embeddings=8192, mlp_bias=False, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, resid_pdrop=0.1, rms_norm_eps=1e-6,
        rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=155136,
    ),
}  # fmt: skip
PARAMETERS = {  # in billions, the embedding and the head included
    "SDAR-4B-Chat": 4.41,
    "SDAR-30B-A3B-Chat": 30.5,
    "DreamReasoner-8B": 8.19,
    "LLaDA2.0-mini": 16.3,
    "Fast_dLLM_v2_7B": 7.62,
    "Stable-DiffCoder-8B-Instruct": 8.25,
}


def mlp(prefix, hidden, size):
    yield f"{prefix}.gate_proj.weight", (size, hidden)
    yield f"{prefix}.up_proj.weight", (size, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, size)


def tensors(config):
    """(name, shape) of every tensor of a checkpoint."""
    ling = config["model_type"] == "llada2_moe"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    q, kv = heads * size, config["num_key_value_heads"] * size
    embedding = "word_embeddings" if ling else "embed_tokens"
    yield f"model.{embedding}.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
        if ling:
            yield f"{layer}.attention.query_key_value.weight", (q + 2 * kv, hidden)
            yield f"{layer}.attention.dense.weight", (hidden, q)
            for norm in ("query_layernorm", "key_layernorm"):
                yield f"{layer}.attention.{norm}.weight", (size,)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
                if config["model_type"] == "Fast_dLLM_Qwen":
                    yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
            if "head_dim" in config:
                for norm in ("q_norm", "k_norm"):
                    yield f"{layer}.self_attn.{norm}.weight", (size,)
        experts = config.get("num_experts", 0)
        if not experts or index < config.get("first_k_dense_replace", 0):
            yield from mlp(f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{layer}.mlp.gate.weight", (experts, hidden)
        for expert in range(experts):
            width = config["moe_intermediate_size"]
            yield from mlp(f"{layer}.mlp.experts.{expert}", hidden, width)
        if ling:
            yield f"{layer}.mlp.gate.expert_bias", (experts,)
            yield from mlp(f"{layer}.mlp.shared_experts", hidden, config["moe_intermediate_size"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_its_place(tmp_path, name):
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    model_config = ModelConfig(model=str(tmp_path), dtype="bfloat16", skip_tokenizer_init=True)
    vllm_config = VllmConfig(model_config=model_config, load_config=LoadConfig(load_format="dummy"))
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
        with torch.device("meta"):
            model = initialize_model(vllm_config=vllm_config)
        listed = dict(tensors(CONFIGS[name]))
        loaded = model.load_weights(
            (key, torch.empty(shape, device="meta")) for key, shape in listed.items()
        )
    assert type(model) is class_of(CONFIGS[name]["architectures"][0])
    parameters = dict(model.named_parameters())
    assert parameters.keys() <= loaded
    count = sum(torch.Size(shape).numel() for shape in listed.values())
    assert count == sum(parameter.numel() for parameter in parameters.values())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize(("own", "expected"), [({}, 4), ({"block_size": 16}, 16)])
def test_a_checkpoint_without_a_d2f_section_decodes_as_published(tmp_path, own, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["SDAR-4B-Chat"] | own))
    model_config = ModelConfig(model=str(tmp_path), dtype="bfloat16", skip_tokenizer_init=True)
    VllmConfig(model_config=model_config, load_config=LoadConfig(load_format="dummy"))
    d2f = model_config.hf_config.d2f
    assert (d2f["block_size"], d2f["max_blocks"], d2f["tau_conf"]) == (expected, 1, 0.85)
    assert (d2f["block_origin"], d2f["prompt_attention"]) == ("zero", "block_causal")
