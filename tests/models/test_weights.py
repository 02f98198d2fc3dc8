# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes with an official checkpoint give the logits of transformers' classes.

The models run outside the engine: attention is replaced by a dense one with a given mask, so that
what is compared is the tensor names, the layers and the head.
"""

import importlib
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from checkpoints import hf_twin, toy_family, write_adapted, write_dream, write_llada, write_toy
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config

import vllm_d2f
from vllm_d2f.models import FAMILIES

# The start-up hook asks every checkpoint how it decodes.
D2F = {"block_size": 8, "max_blocks": 4}
WRITERS = {
    "DreamModel": partial(write_dream, d2f=D2F, tokenizer=False),
    "LLaDAModelLM": partial(write_llada, d2f=D2F, tokenizer=False),
    "ToyQwen3ForCausalLM": partial(write_toy, d2f=D2F, tokenizer=False),
    **{
        f"D2F{stack}ForCausalLM": partial(write_adapted, stack=stack, d2f=D2F, tokenizer=False)
        for stack in ("Llama", "Qwen2", "Qwen3")
    },
}
PROMPT, BLOCK, LENGTH = 10, 8, 34


def block_causal_mask() -> torch.Tensor:
    position = torch.arange(LENGTH)
    block = torch.where(position < PROMPT, 0, 1 + (position - PROMPT) // BLOCK)
    return block[None, :] <= block[:, None]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """vLLM's layers ask for their parallel groups."""
    from vllm.distributed import parallel_state

    vllm_d2f.register()
    vllm_d2f.register()  # safe to repeat
    if parallel_state.model_parallel_is_initialized():
        with toy_family():
            yield
        return
    store = tmp_path_factory.mktemp("store") / "file"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    with toy_family():
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def class_of(architecture: str) -> type:
    return getattr(importlib.import_module("vllm_d2f.worker.model"), architecture)


def load(path) -> SimpleNamespace:
    """Load the checkpoint through vLLM's own model configuration, class look-up and loader."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    model_config = ModelConfig(
        model=str(path), dtype="float32", enforce_eager=True, skip_tokenizer_init=True
    )
    vllm_config = VllmConfig(
        model_config=model_config, load_config=LoadConfig(use_tqdm_on_load=False)
    )
    with set_current_vllm_config(vllm_config):
        with set_default_torch_dtype(torch.float32):
            model = initialize_model(vllm_config=vllm_config)
        get_model_loader(vllm_config.load_config).load_weights(model, model_config)
        process_weights_after_loading(model, model_config, torch.device("cpu"))
    return SimpleNamespace(model=model.eval(), model_config=model_config, vllm_config=vllm_config)


def use_dense_attention(model, mask) -> None:
    from vllm.model_executor.layers.attention import Attention

    def heads(x, count):
        return x.view(len(x), count, -1).transpose(0, 1)[None]

    def dense(layer):
        def forward(query, key, value):
            out = scaled_dot_product_attention(
                heads(query, layer.num_heads),
                heads(key, layer.num_kv_heads),
                heads(value, layer.num_kv_heads),
                attn_mask=mask,
                scale=layer.impl.scale,  # not that of the head size: heads may be padded
                enable_gqa=True,
            )
            return out[0].transpose(0, 1).reshape(len(query), -1)

        return forward

    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.forward = dense(layer)


@torch.no_grad()
def both_logits(path, ids, mask):
    """(vLLM's, transformers')"""
    loaded = load(path)
    use_dense_attention(loaded.model, mask)
    with set_current_vllm_config(loaded.vllm_config):
        hidden = loaded.model(ids, torch.arange(len(ids)))
        assert loaded.model.compute_logits(hidden) is hidden
        ours = loaded.model.project(hidden)
    bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    theirs = hf_twin(path)(ids[None], attention_mask=bias[None, None]).logits[0]
    return ours, theirs


@pytest.mark.parametrize("kind", ["block-causal", "full"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("architecture", WRITERS)
def test_logits_equal_transformers(tmp_path, architecture, shards, kind):
    path = WRITERS[architecture](tmp_path, shards=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    mask = block_causal_mask() if kind == "block-causal" else torch.ones(LENGTH, LENGTH).bool()
    ids = torch.randint(0, 200, (LENGTH,), generator=torch.Generator().manual_seed(1))
    ids[PROMPT + 3 :: 2] = 198  # masks among decided tokens
    ours, theirs = both_logits(path, ids, mask)
    assert ours.shape == (LENGTH, 200) and theirs.std() > 3
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("architecture", WRITERS)
def test_tied_embeddings(tmp_path, architecture):
    path = WRITERS[architecture](tmp_path)
    weights = load_file(path / "model.safetensors")
    olmo = architecture == "LLaDAModelLM"
    head = "model.transformer.ff_out.weight" if olmo else "lm_head.weight"
    save_file({k: v for k, v in weights.items() if k != head}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["weight_tying" if olmo else "tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    ids = torch.arange(LENGTH)
    ours, theirs = both_logits(path, ids, block_causal_mask())
    torch.testing.assert_close(ours, theirs, atol=3e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", WRITERS)
def test_missing_and_unknown_tensors_are_refused(tmp_path, architecture):
    path = WRITERS[architecture](tmp_path)
    weights = load_file(path / "model.safetensors")
    norm = next(name for name in weights if "norm" in name)
    kept = {name: tensor for name, tensor in weights.items() if name != norm}
    save_file(kept, path / "model.safetensors")
    with pytest.raises(ValueError, match="not initialized from checkpoint"):
        load(path)
    save_file(weights | {norm.replace("norm", "side"): torch.ones(3)}, path / "model.safetensors")
    with pytest.raises((ValueError, KeyError), match="no module or parameter"):
        load(path)


@pytest.mark.parametrize("architecture", WRITERS)
def test_vllm_takes_it_for_a_text_generation_model(tmp_path, architecture):
    """A name that ends in "Model" is a pooling model to vLLM unless the class says otherwise."""
    path = WRITERS[architecture](tmp_path, hidden=8, layers=1)
    config = ModelConfig(model=str(path), dtype="float32", skip_tokenizer_init=True)
    assert config.runner_type == "generate" and config.convert_type == "none"
    assert config.architecture == architecture
    assert config.get_hidden_size() == 8


def test_every_family_has_a_class_that_is_made_once():
    for architecture, family in FAMILIES.items():
        cls = class_of(architecture)
        assert cls is class_of(architecture) and cls.family is family
        assert (cls.__name__, cls.__module__) == (architecture, "vllm_d2f.worker.model")
    with pytest.raises(AttributeError, match="no attribute 'GPT2LMHeadModel'"):
        class_of("GPT2LMHeadModel")


def test_vllms_model_info_cache_takes_the_class(tmp_path, monkeypatch):
    """vLLM looks at a class in a process of its own and keeps what it found under the file."""
    from vllm.model_executor.models.registry import ModelRegistry

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    registered = ModelRegistry.models["LLaDAModelLM"]
    found = registered.inspect_model_cls()
    assert found.architecture == "LLaDAModelLM" and found.is_text_generation_model
    (file,) = (tmp_path / "modelinfos").iterdir()
    assert file.name == "vllm_d2f-worker-model-LLaDAModelLM.json"
    assert registered.inspect_model_cls().supports_pp == found.supports_pp  # from the file
    assert registered.load_model_cls() is class_of("LLaDAModelLM")


def test_batch_sharded_sampling_is_off(tmp_path):
    # vLLM's runner asks with hasattr; LlamaForCausalLM has the method.
    model = load(WRITERS["LLaDAModelLM"](tmp_path, hidden=8, layers=1)).model
    assert not hasattr(model, "compute_logits_local")


@pytest.mark.parametrize(
    ("olmo", "llama"),
    [
        ("model.transformer.ff_out", "lm_head"),
        ("model.transformer.ff_out.weight", "lm_head.weight"),
        ("model.transformer.blocks.11.ff_out.weight", "model.layers.11.mlp.down_proj.weight"),
        ("model.transformer.blocks.0.ff_proj", "model.layers.0.mlp.gate_proj"),
        ("model.transformer.blocks.0.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.transformer.ff_output", "model.transformer.ff_output"),
        ("other.model.transformer.wte", "other.model.transformer.wte"),
    ],
)
def test_llada_module_names(olmo, llama):
    """Quantization configs and LoRA adapters name modules, without the parameter."""
    assert class_of("LLaDAModelLM").hf_to_vllm_mapper.get_rename_mapper().map_name(olmo) == llama


@pytest.mark.parametrize(
    ("architecture", "tensor", "module"),
    [
        (
            "LLaDAModelLM",
            "base_model.model.model.transformer.blocks.3.attn_out.lora_A.weight",
            "model.layers.3.self_attn.o_proj",
        ),
        (
            "DreamModel",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight",
            "model.layers.3.self_attn.q_proj",
        ),
    ],
)
def test_published_adapter_names(architecture, tensor, module):
    from vllm.lora.utils import parse_fine_tuned_lora_name

    cls = class_of(architecture)
    name, _ = parse_fine_tuned_lora_name(tensor, cls.hf_to_vllm_mapper.get_rename_mapper())
    assert name == module
    assert any(module.rsplit(".", 1)[1] in v for v in cls.packed_modules_mapping.values()) or (
        module.endswith("o_proj")
    )
