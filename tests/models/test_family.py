# SPDX-License-Identifier: Apache-2.0
"""A family is one description, which a package of its own may bring.

That vLLM builds its class and computes its logits is in `test_weights`.
"""

import json

import pytest
import torch
from checkpoints import hf_twin, toy_family, write_adapted, write_toy
from transformers import AutoConfig

from vllm_d2f.models import FAMILIES, PRESETS
from vllm_d2f.models.family import Family
from vllm_d2f.models.hf import load_hf
from vllm_d2f.settings import request_params, settings_from_dict


@pytest.fixture(scope="module")
def family():
    with toy_family() as found:
        yield found
    assert found.architecture not in FAMILIES


def test_it_is_known_wherever_families_are_named(family):
    assert FAMILIES["ToyQwen3ForCausalLM"] is family
    assert PRESETS["toy-b4"] == {"block_size": 4, "max_blocks": 1, "tau_conf": 0.9}
    settings = settings_from_dict({"block_size": 4}, family=family)
    assert request_params(settings, {"d2f_preset": "b4"}).max_blocks == 1
    with pytest.raises(ValueError, match="presets: .*toy-b4"):
        settings_from_dict(None)


def test_its_attention_rules_are_defaults_of_the_settings(family):
    settings = settings_from_dict({"block_size": 4}, family=family)
    assert (settings.prompt_attention, settings.block_origin) == ("block_causal", "zero")
    assert settings_from_dict(settings.as_dict(), family=family) == settings
    section = {"prompt_attention": "bidirectional", "block_origin": "prompt_end"}
    settings = settings_from_dict({"block_origin": "zero"}, section, family=family)
    assert (settings.prompt_attention, settings.block_origin) == tuple(section.values())
    with pytest.raises(ValueError, match="block_origin must be one of prompt_end, zero, got 1"):
        settings_from_dict({"block_origin": 1}, family=family)


@torch.no_grad()
def test_it_loads_in_transformers(family, tmp_path):
    path = write_toy(tmp_path, tokenizer=False)
    model, config = load_hf(path)
    assert type(config) is family.config and config.family is family
    assert (config.mask_token_id, config.end_token_ids, config.logits_shift) == (198, (199,), False)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert again.to_diff_dict() == config.to_diff_dict()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, hf_twin(path)(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("stack", ["Llama", "Qwen2", "Qwen3"])
def test_adapted_families_load_in_transformers(tmp_path, stack):
    path = write_adapted(tmp_path, stack, tokenizer=False, shards=2)
    model, config = load_hf(path)
    assert config.family is FAMILIES[f"D2F{stack}ForCausalLM"] and config.logits_shift is True
    settings = settings_from_dict({"block_size": 4}, family=config.family)
    assert (settings.prompt_attention, settings.block_origin) == ("block_causal", "prompt_end")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, hf_twin(path)(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 33}, "head_dim 33 must be even"),
        ({"head_dim": 1 << 20}, "head_dim must be an integer"),
        ({"hidden_size": 1 << 20}, "hidden_size must be an integer"),
        ({"mask_token_id": None}, "mask_token_id is missing"),
        ({"mask_token_id": 199}, "mask_token_id 199 is also an end token"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window = True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
    ],
)
def test_its_config_passes_the_common_checks(family, tmp_path, change, message):
    path = write_toy(tmp_path, tokenizer=False, layers=1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(path)


def test_tensor_names_go_both_ways():
    names = {"a.*.x": "m.*.y", "a.*.e.*.up": "m.*.experts.*.up_proj", "a.x": "head"}
    family = Family("t", "T", type("C", (), {}), "", "", tensor_names=names)
    for own, stack in (
        ("a.7.x.weight", "m.7.y.weight"),
        ("a.7.x", "m.7.y"),
        ("a.1.e.23.up.weight", "m.1.experts.23.up_proj.weight"),
        ("a.x.bias", "head.bias"),
    ):
        assert family.to_stack(own) == stack and family.to_checkpoint(stack) == own
    for other in ("a.b.x.weight", "a.7.xx", "b.a.x", "aax"):
        assert family.to_stack(other) == other
