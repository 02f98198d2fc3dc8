# SPDX-License-Identifier: Apache-2.0
"""A folder from a stranger: no file outside it is read, no claim about sizes is believed."""

import json
import os

import pytest

from vllm_d2f.hub import HubError
from vllm_d2f.hub.checkpoint import (
    check_tokenizer_files,
    open_checkpoint,
    plain_file,
    read_header,
    read_json,
)
from vllm_d2f.hub.download import TOKENIZER_FILES
from vllm_d2f.hub.prepare import MergePlan, merge

INDEX = "model.safetensors.index.json"


def change_index(made, change):
    path = made.base / INDEX
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def first_shard(made):
    return sorted(made.base.glob("*.safetensors"))[0]


def test_a_good_folder(made_dream):
    shards = open_checkpoint(made_dream.base)
    assert len(shards) == 3
    assert all(shard.size == shard.path.stat().st_size for shard in shards)
    (info,) = (s.tensors["lm_head.weight"] for s in shards if "lm_head.weight" in s.tensors)
    assert info.dtype == "F32" and info.shape == (200, 64)
    assert info.end - info.begin == 200 * 64 * 4


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        "a\\..\\b.safetensors",
        ".hidden.safetensors",
        "x\n.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_names_files_beside_it_only(dream, tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(first_shard(dream).read_bytes())
    change_index(dream, lambda v: v | {"weight_map": v["weight_map"] | {"lm_head.weight": name}})
    with pytest.raises(HubError, match="names the file"):
        merge(tmp_path / "out", MergePlan(str(dream.base), str(dream.adapter)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {}, "no weight_map"),
        (lambda v: v | {"weight_map": []}, "no weight_map"),
        (
            lambda v: v | {"weight_map": {f"t{i}": f"m{i}.safetensors" for i in range(2000)}},
            "more than 1000",
        ),
        (
            lambda v: v | {"weight_map": v["weight_map"] | {"lm_head.weight": "no.safetensors"}},
            "no such file",
        ),
        (
            lambda v: (
                v | {"weight_map": v["weight_map"] | {"ghost": v["weight_map"]["lm_head.weight"]}}
            ),
            "mixes two downloads",
        ),
    ],
)
def test_a_wrong_index(dream, change, message):
    change_index(dream, change)
    with pytest.raises(HubError, match=message):
        open_checkpoint(dream.base)


def test_a_claimed_total_size_is_not_believed(dream, tmp_path):
    change_index(dream, lambda v: v | {"metadata": {"total_size": 10**18}})
    assert merge(tmp_path / "out", MergePlan(str(dream.base), str(dream.adapter))).is_dir()


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "config.json", "tokenizer_config.json"]
)
def test_a_link_out_of_the_folder_is_not_followed(dream, tmp_path, name):
    outside = tmp_path / "outside.json"
    (dream.base / name).rename(outside)
    (dream.base / name).symlink_to(outside)
    with pytest.raises(HubError, match="leads out of its folder"):
        merge(tmp_path / "out", MergePlan(str(dream.base), str(dream.adapter)))


def test_a_linked_shard_is_not_followed_out_of_the_folder(dream, tmp_path):
    shard = first_shard(dream)
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(HubError, match="leads out of its folder"):
        open_checkpoint(dream.base)


def test_links_of_the_hubs_cache_are_followed(made_dream, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(made_dream.base.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert len(open_checkpoint(snapshot)) == 3


def header(value: dict, claimed: int | None = None) -> bytes:
    text = json.dumps(value).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"not a safetensors file at all",
        header({"a": ENTRY}, claimed=1 << 62) + bytes(8),
        header({"a": ENTRY}) + bytes(7),
        header({"a": ENTRY}) + bytes(9),
        header({"a": ENTRY | {"shape": [1 << 62, 4]}}) + bytes(8),
        header({"a": ENTRY | {"shape": [-2]}}) + bytes(8),
        header({"a": ENTRY | {"data_offsets": [-8, 0]}}) + bytes(8),
        header({"a": ENTRY | {"data_offsets": [0, 1 << 60]}}) + bytes(8),
        header({"a": ENTRY, "b": ENTRY}) + bytes(8),
        header({"a": ENTRY | {"dtype": "PICKLE"}}) + bytes(8),
    ],
)
def test_a_wrong_header(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(HubError, match="damaged or incomplete|not a safetensors file"):
        read_header(path)


def test_a_tensor_in_two_files(dream):
    shards = sorted(dream.base.glob("*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(HubError, match="is also in"):
        open_checkpoint(dream.base)


@pytest.mark.parametrize("content", ["{", "[]", "7", '"x"', "[" * 100_000, "\udcff"])
def test_wrong_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(HubError, match="config.json"):
        read_json(path)


def test_large_json(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 30)  # sparse: takes no space
    with pytest.raises(HubError, match="larger than"):
        read_json(path)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "missing", "folder"])
def test_plain_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(HubError):
        plain_file(tmp_path, name)


def test_pickled_weights(dream):
    for file in [*dream.base.glob("*.safetensors"), dream.base / INDEX]:
        file.rename(file.with_name(file.name.replace("safetensors", "bin")))
    with pytest.raises(HubError, match="pickle"):
        open_checkpoint(dream.base)


def test_a_base_without_a_tokenizer(tmp_path, dream):
    """Merged it would serve a tokenizer that knows no text."""
    for name in TOKENIZER_FILES:
        (dream.base / name).unlink(missing_ok=True)
    with pytest.raises(HubError, match="neither tokenizer.json nor vocab.json with merges.txt"):
        merge(tmp_path / "out", MergePlan(str(dream.base), str(dream.adapter)))
    assert not (tmp_path / "out").exists()
    for files in (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",)):
        for name in files:
            (dream.base / name).touch()
        check_tokenizer_files(dream.base)
        for name in files:
            (dream.base / name).unlink()


def test_no_checkpoint(tmp_path, dream):
    base, adapter = str(dream.base), str(dream.adapter)
    with pytest.raises(HubError, match="no such folder"):
        merge(tmp_path / "out", MergePlan(str(tmp_path / "none"), adapter))
    with pytest.raises(HubError, match="an adapter, not a base"):
        merge(tmp_path / "out", MergePlan(adapter, adapter))
    (dream.base / "config.json").unlink()
    with pytest.raises(HubError, match="config.json: no such file"):
        merge(tmp_path / "out", MergePlan(base, adapter))
