# SPDX-License-Identifier: Apache-2.0
"""A widened checkpoint computes the function of its original; what cannot be widened is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import write_dream, write_llada
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2ForCausalLM

from benchmarks.harness.widen import widen
from vllm_d2f.hub.names import resolve
from vllm_d2f.models import register_configs

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(autouse=True)
def configs():
    register_configs()


def logits(folder):
    config = AutoConfig.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = Qwen2ForCausalLM(config).double().eval()
    model.load_state_dict(weights)
    tokens = torch.randint(0, 190, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def changed(source, folder, **fields):
    """Copy a checkpoint, with other fields in its config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("model", "tied", "head_size"),
    [
        ("golden", False, 64),
        ("d2f-tiny", False, 128),
        ("ar-tiny", False, 64),
        ("d2f-tiny", True, 96),
    ],
)
def test_the_logits_are_those_of_the_original(tmp_path, model, tied, head_size):
    original = GOLDEN if model == "golden" else Path(resolve(model))
    # With so large an epsilon a wrong one shows.
    fields = {"rms_norm_eps": 0.1, "tie_word_embeddings": tied}
    source = changed(original, tmp_path / "source", **fields)
    if tied:
        weights = load_file(source / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, source / "model.safetensors")
    wide = widen(source, tmp_path / "wide", head_size)
    assert AutoConfig.from_pretrained(wide).hidden_size == 4 * head_size
    # Norms are computed in float32, whatever the rest is.
    torch.testing.assert_close(logits(wide), logits(source), rtol=0, atol=1e-4)
    assert {file.name for file in wide.iterdir()} == {file.name for file in source.iterdir()}


def test_what_cannot_be_widened_is_said(tmp_path):
    with pytest.raises(ValueError, match="LLaDAModelLM cannot be widened"):
        widen(write_llada(tmp_path / "llada", tokenizer=False), tmp_path / "wide", 64)
    with pytest.raises(ValueError, match="shards cannot be widened"):
        widen(write_dream(tmp_path / "shards", tokenizer=False, shards=2), tmp_path / "wide", 64)
    for head_size in (8, 40):
        with pytest.raises(ValueError, match=f"heads of 16 do not divide {head_size}"):
            widen(GOLDEN, tmp_path / "wide", head_size)

    scaled = changed(GOLDEN, tmp_path / "scaled", rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="rotary embeddings of another kind"):
        widen(scaled, tmp_path / "wide", 64)
    other = changed(GOLDEN, tmp_path / "other", head_dim=32)
    with pytest.raises(ValueError, match="4 heads of 32 are not the hidden size 64"):
        widen(other, tmp_path / "wide", 64)
    named = changed(GOLDEN, tmp_path / "named")
    weights = load_file(named / "model.safetensors")
    save_file(weights | {"model.extra.weight": torch.ones(2)}, named / "model.safetensors")
    with pytest.raises(ValueError, match=r"no rule .* model\.extra\.weight"):
        widen(named, tmp_path / "wide", 64)
    assert not (tmp_path / "wide").exists()
