# SPDX-License-Identifier: Apache-2.0
"""Weights that the devices of this machine cannot hold are named before they are downloaded."""

from types import SimpleNamespace

import pytest

from vllm_d2f.hub import download
from vllm_d2f.hub.download import Source, fetch_weights

GB = 10**9


@pytest.mark.parametrize("memory", [GB, 32 * GB])
def test_weights_above_the_memory_are_named_before_the_download(tmp_path, monkeypatch, memory):
    """The message comes first, and it is no refusal: quantized weights may fit."""
    events = []
    (tmp_path / "model.safetensors").touch()
    files = [SimpleNamespace(file_size=16 * GB, will_download=True)]
    monkeypatch.setattr(download, "snapshot_download", lambda *args, **options: files)
    monkeypatch.setattr(download, "_device_memory", lambda: memory)
    monkeypatch.setattr(download, "check_space", lambda *args: None)
    monkeypatch.setattr(download, "shard_names", lambda folder: ["model.safetensors"])
    monkeypatch.setattr(download, "say", events.append)
    monkeypatch.setattr(download, "_fetch", lambda *args: events.append("downloaded"))
    fetch_weights(Source("some/model", None, tmp_path), tmp_path)
    *said, last = events
    assert last == "downloaded" and len(said) == (memory < 16 * GB)
    for message in said:
        assert "some/model: its weights take 16.0 GB" in message and "hold 1.0 GB" in message
