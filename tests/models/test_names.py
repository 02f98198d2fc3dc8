# SPDX-License-Identifier: Apache-2.0
"""Short names resolve to folders; everything else is left alone."""

import json

import pytest

from vllm_d2f.hub import names
from vllm_d2f.hub.names import (
    EMBEDDED,
    UnknownModelError,
    is_name,
    known_names,
    resolve,
    tokenizer_of,
)
from vllm_d2f.models import PUBLISHED


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """Stands in for the package's own folder, which another part of the project fills."""
    for name in EMBEDDED:
        folder = tmp_path / "package" / "embedded" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    monkeypatch.setattr(names.resources, "files", lambda package: tmp_path / "package")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "package" / "embedded"


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded(embedded, name):
    assert resolve(name) == str(embedded / name)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen3-0.6B",
        "gpt2",
        "d2f",
        "me/d2f-tiny",
        "./d2f-tiny",
        "/models/d2f-foo",
        "s3://bucket/d2f-tiny",
        "arctic",
        "",
    ],
)
def test_others_are_unchanged(embedded, name):
    assert resolve(name) == name


def test_an_existing_path_wins(embedded):
    for name in ("d2f-tiny", "d2f-mine"):
        (embedded.parents[1] / "cwd" / name).mkdir()
        assert resolve(name) == name


@pytest.mark.parametrize(("name", "close"), [("d2f-tinny", "d2f-tiny"), ("ar-tin", "ar-tiny")])
def test_misspelt(embedded, name, close):
    with pytest.raises(UnknownModelError, match=f"Did you mean {close}") as error:
        resolve(name)
    assert all(known in str(error.value) for known in known_names())


def test_unknown(embedded):
    with pytest.raises(UnknownModelError, match="unknown model name 'd2f-zzzzzzzzzzzz'. vllm-d2f"):
        resolve("d2f-zzzzzzzzzzzz")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_is_ours_without_a_download(embedded, tmp_path, monkeypatch, name):
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    assert is_name(name) and not is_name(PUBLISHED[name].base)
    assert not (tmp_path / "cache").exists()


def test_missing_folder(embedded):
    (embedded / "d2f-tiny" / "config.json").unlink()
    with pytest.raises(UnknownModelError, match="reinstall"):
        resolve("d2f-tiny")


@pytest.fixture
def patched(embedded):
    from vllm_d2f.patches.p05_model_names import p05_model_names
    from vllm_d2f.patches.patch import find

    import vllm_d2f

    vllm_d2f.register()  # vLLM does so in EngineArgs; what follows must not undo it
    targets = {target: find("test", target) for target in p05_model_names.replacements}
    p05_model_names.install()
    p05_model_names.install()
    yield embedded
    for owner, attribute, value in targets.values():
        setattr(owner, attribute, value)


def test_the_sources_are_the_ones_it_was_written_against():
    from vllm_d2f.patches.p05_model_names import p05_model_names
    from vllm_d2f.patches.patch import check_sources

    assert check_sources(p05_model_names.name, p05_model_names.written_against) == []


def test_engine_arguments_keep_the_name_for_clients(patched, tmp_path, monkeypatch):
    """The whole way of `LLM(model="d2f-tiny")` and `vllm serve` up to the model's config."""
    import huggingface_hub.constants
    from checkpoints import write_dream
    from vllm.engine.arg_utils import EngineArgs

    write_dream(patched / "d2f-tiny")
    for offline in (True, False):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        args = EngineArgs(model="d2f-tiny", dtype="float32", load_format="safetensors")
        assert args.model == "d2f-tiny"
    from vllm.engine import arg_utils

    resolved = arg_utils.maybe_override_with_speculators(
        model="d2f-tiny", tokenizer=None, trust_remote_code=False
    )
    assert resolved == ("d2f-tiny", None, None)
    config = args.create_model_config()
    assert config.served_model_name == "d2f-tiny"
    assert config.model == config.tokenizer == str(patched / "d2f-tiny")
    assert config.runner_type == "generate" and config.convert_type == "none"
    assert config.hf_config.model_type == "Dream"


def test_a_tokenizer_by_name(patched, tmp_path, monkeypatch):
    """As `vllm bench serve` and `bench throughput` ask for it, without a network."""
    from checkpoints import write_dream
    from vllm.tokenizers import get_tokenizer

    write_dream(patched / "d2f-tiny")
    by_name = get_tokenizer("d2f-tiny", tokenizer_mode="auto")
    assert by_name.get_vocab() == get_tokenizer(str(patched / "d2f-tiny")).get_vocab()
    assert len(by_name.get_vocab()) > 100
    with pytest.raises(UnknownModelError, match="Did you mean d2f-tiny"):
        get_tokenizer("d2f-tinny")
    # Nobody downloads 31 GB for a tokenizer: the base's is the same.
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    for name in PUBLISHED:
        assert tokenizer_of(name) == PUBLISHED[name].base
    assert tokenizer_of("me/model") == "me/model"


def test_misspelt_name_reaches_the_user(patched):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="Did you mean d2f-tiny"):
        EngineArgs(model="d2f-tinny").create_engine_config()


def test_a_users_redirect_comes_first(patched, tmp_path, monkeypatch):
    from vllm.config import model as module

    table = tmp_path / "redirect.json"
    table.write_text(json.dumps({"d2f-tiny": "/elsewhere"}))
    monkeypatch.setenv("VLLM_MODEL_REDIRECT_PATH", str(table))
    original = module.maybe_model_redirect._d2f_original
    original.cache_clear()
    try:
        assert module.maybe_model_redirect("d2f-tiny") == "/elsewhere"
    finally:
        original.cache_clear()
