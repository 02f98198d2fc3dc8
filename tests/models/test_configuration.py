# SPDX-License-Identifier: Apache-2.0
"""Official config.json files load without remote code; what cannot be served is refused by name."""

import json
import pickle

import pytest
from checkpoints import write_dream, write_llada
from published_runs import DATA
from transformers import AutoConfig

from vllm_d2f.models import register_configs
from vllm_d2f.models.dream import DreamConfig
from vllm_d2f.models.llada import LLaDAConfig


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_configs()
    register_configs()  # safe to repeat


@pytest.fixture(scope="module")
def dream_json(tmp_path_factory):
    path = write_dream(tmp_path_factory.mktemp("dream"), tokenizer=False)
    return json.loads((path / "config.json").read_text())


@pytest.fixture(scope="module")
def llada_json(tmp_path_factory):
    path = write_llada(tmp_path_factory.mktemp("llada"), tokenizer=False)
    return json.loads((path / "config.json").read_text())


def load(path, config, trust_remote_code=False):
    (path / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


@pytest.mark.parametrize("trust", [False, True, None])
def test_dream_loads_without_remote_code(tmp_path, dream_json, trust):
    assert "auto_map" in dream_json
    config = load(tmp_path, dream_json | {"d2f": {"block_size": 8, "x": [1]}}, trust)
    assert type(config) is DreamConfig
    assert config.architectures == ["DreamModel"]
    assert (config.mask_token_id, config.eos_token_id, config.end_token_ids) == (198, 199, (199,))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.sliding_window is None and set(config.layer_types) == {"full_attention"}
    assert config.logits_shift is True
    assert config.d2f == {"block_size": 8, "x": [1]}
    assert not hasattr(config, "auto_map")


@pytest.mark.parametrize("trust", [False, True, None])
def test_llada_loads_without_remote_code(tmp_path, llada_json, trust):
    config = load(tmp_path, llada_json, trust)
    assert type(config) is LLaDAConfig
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert (config.intermediate_size, config.vocab_size) == (160, 200)
    assert config.max_position_embeddings == 1024 and config.rms_norm_eps == 1e-5
    assert config.hidden_act == "silu" and config.tie_word_embeddings is False
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert config.logits_shift is False and config.d2f is None
    # OLMo's names stay readable.
    assert (config.d_model, config.n_layers, config.max_sequence_length) == (64, 3, 1024)


def test_published_sizes():
    dream = DreamConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_theta=1000000.0,
        eos_token_id=151643,
    )
    assert dream.mask_token_id == 151666 and dream.end_token_ids == (151643,)
    llada = LLaDAConfig(
        vocab_size=126464,
        embedding_size=126464,
        d_model=4096,
        n_heads=32,
        n_kv_heads=32,
        n_layers=32,
        mlp_hidden_size=12288,
        eos_token_id=126081,
    )
    assert llada.mask_token_id == 126336 and llada.end_token_ids == (126081, 126348)


def test_null_sizes_take_olmo_defaults(llada_json):
    config = LLaDAConfig(**llada_json | {"mlp_hidden_size": None, "n_kv_heads": None})
    assert config.intermediate_size == 4 * 64 and config.num_key_value_heads == 4


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_saves_loads_and_pickles(tmp_path, request, family):
    config = load(tmp_path, request.getfixturevalue(f"{family}_json") | {"d2f": {"a": 1}})
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert type(again) is type(config)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert pickle.loads(pickle.dumps(config)).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"intermediate_size": 10**9}, "intermediate_size"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e9}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"qk_norm": True}, "qk_norm"),
        ({"head_dim": 32}, "head_dim"),
        ({"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config"),
        ({"mask_token_id": 200}, "mask_token_id"),
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"mask_token_id": 199}, "mask_token_id"),
        ({"eos_token_id": [1, 4000]}, "eos_token_id"),
        ({"eos_token_id": list(range(100))}, "eos_token_id"),
        ({"pad_token_id": 10**30}, "pad_token_id"),
    ],
)
def test_dream_refuses(dream_json, change, field):
    with pytest.raises(Exception, match=field.replace(".", r"\.")) as refusal:
        DreamConfig(**dream_json | change)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"alibi": True}, "alibi"),
        ({"rope": False}, "rope"),
        ({"include_bias": True}, "include_bias"),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"activation_type": "swiglu"}, "activation_type"),
        ({"block_type": "sequential"}, "block_type"),
        ({"block_group_size": 2}, "block_group_size"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"layer_norm_with_affine": False}, "layer_norm_with_affine"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm"),
        ({"attention_layer_norm": True}, "attention_layer_norm"),
        ({"input_emb_norm": True}, "input_emb_norm"),
        ({"multi_query_attention": True}, "multi_query_attention"),
        ({"scale_logits": True}, "scale_logits"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"attention_bias": True}, "attention_bias"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"embedding_size": 256}, "embedding_size"),
        ({"d_model": True}, "d_model"),
        ({"d_model": 65}, "d_model"),
        ({"n_layers": 10**12}, "n_layers"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"mlp_hidden_size": -1}, "mlp_hidden_size"),
        ({"mlp_hidden_size": None, "mlp_ratio": 10**9}, "mlp_ratio"),
        ({"max_sequence_length": 10**12}, "max_sequence_length"),
        ({"weight_tying": "yes"}, "weight_tying"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"mask_token_id": 126336}, "mask_token_id"),
        ({"mask_token_id": None}, "mask_token_id"),
    ],
)
def test_llada_refuses(llada_json, change, field):
    with pytest.raises(Exception, match=field) as refusal:
        LLaDAConfig(**llada_json | change)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (dict(score_function="softmax"), "score_function"),
        (dict(use_qk_norm=False), "use_qk_norm"),
        (dict(norm_topk_prob=False), "norm_topk_prob"),
        (dict(use_qkv_bias=True), "use_qkv_bias"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok"),
        (dict(num_experts=1 << 20), "n_routed_experts"),
        (dict(num_experts="8"), "num_experts = '8' has the wrong type"),
        (dict(topk_group=0), "topk_group"),
        (dict(partial_rotary_factor=0.3), "partial_rotary_factor"),
        (dict(rotary_dim=4), "rotary_dim"),
        (dict(moe_shared_expert_intermediate_size=64), "moe_shared_expert_intermediate_size"),
        (dict(delete_token_id=5), "LLaDA2.2 inserts and deletes"),
        (dict(sliding_window=512, use_sliding_window=True), "sliding_window"),
    ],
)
def test_llada2_refuses(tmp_path, change, field):
    config = json.loads((DATA / "llada2" / "config.json").read_text())
    with pytest.raises(ValueError, match=field):
        load(tmp_path, config | change)


def test_is_causal_is_left_to_the_batch(dream_json):
    # vLLM would build encoder attention, which has no KV cache.
    assert not hasattr(DreamConfig(**dream_json | {"is_causal": False}), "is_causal")


@pytest.mark.parametrize("written", [True, False, None])
def test_logits_shift_in_config_json_wins_over_the_familys(tmp_path, dream_json, written):
    config = load(tmp_path, dream_json | {"logits_shift": written})
    assert config.logits_shift is (True if written is None else written)
    with pytest.raises(Exception, match="logits_shift"):
        DreamConfig(**dream_json | {"logits_shift": "previous"})
