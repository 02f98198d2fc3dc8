# SPDX-License-Identifier: Apache-2.0
"""An adapter for Base is not merged into Instruct, and the other way round."""

import json

import pytest
from lora import change_config

from vllm_d2f.hub import HubError
from vllm_d2f.hub.prepare import MergePlan, merge, plan_of, prepare, variant_of


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("Dream-org/Dream-v0-Base-7B", "base"),
        ("Dream-org/Dream-v0-Instruct-7B", "instruct"),
        ("GSAI-ML/LLaDA-8B-Instruct", "instruct"),
        ("/data/models/LLaDA-8B-Base/", "base"),
        ("SJTU-Deng-Lab/D2F_Dream_Base_7B_Lora", "base"),
        ("SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora", "instruct"),
        ("C:\\models\\llada-8b-chat", "instruct"),
        ("apple/DiffuCoder-7B-Instruct", "instruct"),
        ("/hub/models--GSAI-ML--LLaDA-8B-Base/snapshots/0123abc", "base"),
        # Say nothing: no family, no variant, both, or only in a folder further up.
        ("base", None),
        ("/data/base", None),
        ("/Dream-Base/model", None),
        ("GSAI-ML/LLaDA-1.5", None),
        ("dream-base-to-instruct", None),
        ("database-llada", None),
        ("", None),
    ],
)
def test_variant_of(name, variant):
    assert variant_of(name) == variant


def rename(made, name: str):
    return made.base.rename(made.base.with_name(name))


def try_to_prepare(base, adapter, name="d2f-dream-7b", **options):
    return prepare(name, plan_of(name, str(base), str(adapter), **options))


def test_the_right_base(dream, llada):
    assert (try_to_prepare(dream.base, dream.adapter) / "config.json").is_file()
    assert (try_to_prepare(llada.base, llada.adapter, "d2f-llada-8b") / "config.json").is_file()


def test_by_the_folders_name(dream, cache_folder):
    base = rename(dream, "Dream-v0-Instruct-7B")
    with pytest.raises(HubError, match="wrong base.*'instruct' by the folder's name") as error:
        try_to_prepare(base, dream.adapter)
    assert "--allow-other-base" in str(error.value)
    assert not (cache_folder / "d2f-dream-7b").exists()
    assert try_to_prepare(base, dream.adapter, check_variant=False).is_dir()


def test_by_the_bases_config(dream):
    base = rename(dream, "model")
    config = json.loads((base / "config.json").read_text())
    config["_name_or_path"] = "Dream-org/Dream-v0-Instruct-7B"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match="_name_or_path"):
        try_to_prepare(base, dream.adapter)


def test_by_the_adapters_config(dream):
    change_config(dream.adapter, base_model_name_or_path="/home/x/Dream-v0-Instruct-7B")
    with pytest.raises(HubError, match="base_model_name_or_path"):
        try_to_prepare(dream.base, dream.adapter)


def test_by_the_adapters_name(dream, tmp_path):
    adapter = dream.adapter.rename(tmp_path / "D2F_Dream_Instruct_7B_Lora")
    with pytest.raises(HubError, match="the adapter's name"):
        try_to_prepare(dream.base, adapter)


def test_without_a_name_the_adapter_decides(dream, tmp_path):
    change_config(dream.adapter, base_model_name_or_path="Dream-org/Dream-v0-Instruct-7B")
    with pytest.raises(HubError, match="the base .* is for 'base' by the folder's name"):
        merge(tmp_path / "out", MergePlan(str(dream.base), str(dream.adapter)))


def test_nothing_known_is_a_warning(dream, caplog):
    base = rename(dream, "some-folder")
    assert try_to_prepare(base, dream.adapter).is_dir()
    assert "nothing in" in caplog.text and "the base one" in caplog.text


def test_the_cached_download_of_another_model(dream, tmp_path):
    """`--base` may point into the Hub's cache, whose folder names the repository."""
    snapshot = tmp_path / "models--Dream-org--Dream-v0-Instruct-7B" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    dream.base.rename(snapshot)
    with pytest.raises(HubError, match="'instruct' by its name on the Hub"):
        try_to_prepare(snapshot, dream.adapter)


def test_another_family(llada, dream):
    with pytest.raises(HubError, match="'LLaDAModelLM', expected DreamModel"):
        try_to_prepare(llada.base, dream.adapter)
