# SPDX-License-Identifier: Apache-2.0
"""An adapter for Base is not merged into Instruct, and the other way round."""

import json

import pytest
from lora import change_config

from vllm_d2f.hub import HubError
from vllm_d2f.hub.prepare import Plan, merge, plan_of, prepare
from vllm_d2f.hub.provenance import variant_of
from vllm_d2f.hub.registry import MODELS


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
    return prepare(name, plan_of(MODELS[name], str(base), str(adapter), **options))


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


def test_by_the_bases_readme(llada):
    base = rename(llada, "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# LLaDA-8B-Base\n\nText.\n")
    with pytest.raises(HubError, match="first heading of README.md"):
        try_to_prepare(base, llada.adapter, "d2f-llada-8b")


def test_by_the_missing_chat_template(llada):
    base = rename(llada, "base")
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("chat_template")
    path.write_text(json.dumps(settings))
    with pytest.raises(HubError, match="no chat template"):
        try_to_prepare(base, llada.adapter, "d2f-llada-8b")


def test_by_the_adapters_config(dream):
    change_config(dream.adapter, base_model_name_or_path="/home/x/Dream-v0-Instruct-7B")
    with pytest.raises(HubError, match="base_model_name_or_path"):
        try_to_prepare(dream.base, dream.adapter)


def test_by_the_adapters_readme(dream):
    (dream.adapter / "README.md").write_text(
        "---\nbase_model:\n- Dream-org/Dream-v0-Instruct-7B\n---\n# adapter\n"
    )
    with pytest.raises(HubError, match="the adapter's README.md, base_model"):
        try_to_prepare(dream.base, dream.adapter)


def test_a_damaged_readme_says_nothing(dream):
    (dream.adapter / "README.md").write_text("---\nbase_model: [\n\t: {{\n---\n")
    assert try_to_prepare(dream.base, dream.adapter).is_dir()


def test_without_a_name_the_adapter_decides(dream, tmp_path):
    change_config(dream.adapter, base_model_name_or_path="Dream-org/Dream-v0-Instruct-7B")
    with pytest.raises(HubError, match="the base .* is for 'base' by the folder's name"):
        merge(tmp_path / "out", Plan(str(dream.base), str(dream.adapter)))


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
