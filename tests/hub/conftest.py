# SPDX-License-Identifier: Apache-2.0
"""Tiny bases and adapters, and a cache of their own for every test."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from checkpoints import write_dream, write_llada  # noqa: E402
from lora import Made, make  # noqa: E402


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    """Merged models of a test go to its own folder."""
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def made_dream(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("dream")
    base = write_dream(folder / "Dream-v0-Base-7B", shards=3, seed=3)
    return make(base, folder / "lora", olmo=False)


@pytest.fixture(scope="session")
def made_llada(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("llada")
    base = write_llada(folder / "LLaDA-8B-Instruct", seed=4)
    return make(base, folder / "lora", olmo=True)


@pytest.fixture
def dream(made_dream, tmp_path) -> Made:
    """A copy to spoil."""
    base = shutil.copytree(made_dream.base, tmp_path / made_dream.base.name)
    adapter = shutil.copytree(made_dream.adapter, tmp_path / "dream-lora")
    return Made(base, adapter, made_dream.merged, made_dream.model)


@pytest.fixture
def llada(made_llada, tmp_path) -> Made:
    base = shutil.copytree(made_llada.base, tmp_path / made_llada.base.name)
    adapter = shutil.copytree(made_llada.adapter, tmp_path / "llada-lora")
    return Made(base, adapter, made_llada.merged, made_llada.model)
