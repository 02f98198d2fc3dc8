# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder from a stranger, given to `vllm serve`: no code of it runs, no pickle is
read, no file outside it, and its config cannot claim more than its files hold.
"""

import json
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1])]

from checkpoints import change_weights, write_dream, write_llada  # noqa: E402
from huggingface_hub.errors import StrictDataclassFieldValidationError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.tokenizers import get_tokenizer  # noqa: E402

import vllm_d2f  # noqa: E402
from vllm_d2f.hub.download import TOKENIZER_FILES  # noqa: E402
from vllm_d2f.startup import D2FConfigHook  # noqa: E402

vllm_d2f.register()

D2F = {"block_size": 8, "max_blocks": 2}


def config(folder, **options):
    """Return what `vllm serve` builds before it starts an engine."""
    options = {"dtype": "float32", "enforce_eager": True} | options
    return EngineArgs(model=str(folder), **options).create_engine_config()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One whole configuration; making one for each test takes seconds."""
    return config(write_dream(tmp_path_factory.mktemp("good"), d2f=D2F))


@pytest.fixture
def check(made, monkeypatch):
    """Folder -> what vLLM's start-up does with it, from reading its config to our hook."""

    def run(folder, load_format="auto"):
        model_config, load_config = made.model_config, made.load_config
        hf_config = AutoConfig.from_pretrained(folder)
        monkeypatch.setattr(model_config, "hf_config", hf_config)
        monkeypatch.setattr(model_config, "_architecture", hf_config.architectures[0])
        monkeypatch.setattr(model_config, "model", str(folder))
        monkeypatch.setattr(load_config, "load_format", load_format)
        D2FConfigHook.verify_and_update_config(made)
        return made

    return run


def rewrite(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def dream(tmp_path):
    return write_dream(tmp_path / "dream", d2f=D2F)


@pytest.fixture
def llada(tmp_path):
    return write_llada(tmp_path / "llada", d2f=D2F, shards=2)


def test_good_folders_are_served_from_safetensors(dream, llada, check):
    for folder in (dream, llada):
        assert check(folder).load_config.load_format == "safetensors"


@pytest.mark.parametrize("trust", [False, True])
def test_no_code_of_the_checkpoint_runs(dream, tmp_path, trust):
    marker = tmp_path / "it ran"
    for name in ("configuration_dream", "modeling_dream", "tokenization_dream"):
        (dream / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    made = config(dream, trust_remote_code=trust).model_config
    assert type(made.hf_config).__module__ == "vllm_d2f.models.dream"
    # As the engine and the server load it.
    tokenizer = get_tokenizer(made.tokenizer, trust_remote_code=made.trust_remote_code)
    assert tokenizer.encode("a pen")
    assert not marker.exists()


def test_a_model_without_a_tokenizer_is_not_started(dream, made, monkeypatch):
    """transformers would make an empty one, and every prompt be refused as empty."""
    for name in TOKENIZER_FILES:
        (dream / name).unlink(missing_ok=True)
    monkeypatch.setattr(made.model_config, "tokenizer", str(dream))
    with pytest.raises(ValueError, match="neither tokenizer.json nor vocab.json with merges.txt"):
        D2FConfigHook.verify_and_update_config(made)
    monkeypatch.setattr(made.model_config, "skip_tokenizer_init", True)
    D2FConfigHook.verify_and_update_config(made)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickle_is_refused_before_it_is_opened(dream, tmp_path, check, name):
    (dream / "model.safetensors").unlink()
    (dream / name).write_bytes(pickle.dumps(Bomb(tmp_path / "it ran")))
    with pytest.raises(ValueError, match="pickle.*only safetensors are read.*safe_serialization"):
        check(dream)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_load_formats_that_read_pickle_are_refused(dream, check, load_format):
    with pytest.raises(ValueError, match=f"--load-format {load_format}: it reads pickle"):
        check(dream, load_format)


def test_dummy_weights_need_no_files(dream, check):
    (dream / "model.safetensors").unlink()
    assert check(dream, "dummy").load_config.load_format == "dummy"
    with pytest.raises(ValueError, match="no .safetensors files"):
        check(dream)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_an_index_names_files_beside_it(llada, check, name):
    path = llada / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.transformer.wte.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names the file"):
        check(llada)


def test_weights_that_are_a_link_out_of_the_folder(dream, check, tmp_path):
    os.rename(dream / "model.safetensors", tmp_path / "outside.safetensors")
    (dream / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="leads out of its folder"):
        check(dream)


def header(length, text=b"{}"):
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(1 << 62),
        header((1 << 63) + 5),
        header(2),
        header(100_000_001, b"{" + b" " * 1000),
        header(9, b"not JSON!"),
        header(len(b'{"a":' * 5000), b'{"a":' * 5000),
        header(62, b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'[:62]),
    ],
)
def test_headers_that_lie(dream, check, content):
    (dream / "model.safetensors").write_bytes(content)
    lies = r"damaged or incomplete|not a safetensors file|hold nothing of layer 0"
    with pytest.raises(ValueError, match=lies):
        check(dream)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 1 << 16, "num_attention_heads": 1024}, "do not belong together"),
        ({"vocab_size": 1 << 22}, "do not belong together"),
        ({"intermediate_size": 1 << 20}, "do not belong together"),
        ({"num_hidden_layers": 1024, "max_window_layers": 1024}, "nothing of layer 1023"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"vocab_size": "200"}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"mask_token_id": 1 << 40}, "mask_token_id"),
        ({"mask_token_id": [198]}, "mask_token_id"),
        ({"eos_token_id": [199] * 1000}, "eos_token_id"),
        ({"d2f": {"block_size": 1 << 40}}, "window"),
        ({"d2f": [1]}, "must be an object"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e9}}, "rope_type"),
    ],
)
def test_a_config_that_claims_too_much(dream, check, entries, message):
    rewrite(dream, **entries)
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):
        check(dream)


def test_the_generation_config_is_checked_too(dream, check):
    path = dream / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d2f": {"blocks": 1}}))
    with pytest.raises(ValueError, match="unknown setting 'blocks'"):
        check(dream)


def test_the_largest_allowed_window_is_bounded_by_what_it_costs(dream):
    made = config(dream, additional_config={"d2f": {"window": 4096}})
    assert made.diffusion_config.canvas_length == 4096
    with pytest.raises(ValueError, match="4096"):
        config(dream, additional_config={"d2f": {"window": 4097}})


def test_changed_weights_still_load(dream, check):
    """The helper writes what safetensors reads."""
    before = load_file(dream / "model.safetensors")
    change_weights(dream, lambda weights: weights["model.norm.weight"].zero_())
    after = load_file(dream / "model.safetensors")
    assert before.keys() == after.keys() and not after["model.norm.weight"].any()
    check(dream)
