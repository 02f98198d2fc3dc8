# SPDX-License-Identifier: Apache-2.0
"""The way through the Hub, against a local stand-in that speaks its API and breaks on demand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_process import CommandProcess
from hub_standin import Standin, commit_of, serve
from safetensors.torch import load_file

from vllm_d2f.hub import cache
from vllm_d2f.models import PUBLISHED

NAME = "d2f-dream-7b"
BASE, ADAPTER = PUBLISHED[NAME].base, PUBLISHED[NAME].adapter


@pytest.fixture(scope="module")
def server():
    with serve() as standin:
        yield standin


@pytest.fixture(scope="module")
def program(server: Standin, tmp_path_factory):
    """The command line with an own Hub cache."""
    home = tmp_path_factory.mktemp("hf")
    process = CommandProcess(environment(server.url, home))
    yield process, home
    process.close()


def environment(url: str, home: Path) -> dict[str, str]:
    local = "127.0.0.1,localhost"
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": local,
        "no_proxy": local,
    }


@pytest.fixture
def hub(server, made_dream):
    """The two repositories of the model, as good as new."""
    server.reset()
    server.add(BASE, made_dream.base, {"modeling_dream.py": b"raise SystemExit('code ran')"})
    server.add(ADAPTER, made_dream.adapter)
    return server


@pytest.fixture
def run(hub: Standin, program, cache_folder):
    """`python -m vllm_d2f ARGUMENTS`; returns what it printed."""
    process, home = program
    shutil.rmtree(home / "hub", ignore_errors=True)

    def command(*arguments: str, status: int = 0, **constants) -> str:
        found, shown = process.run(
            list(arguments), environment={"D2F_CACHE": str(cache_folder)}, constants=constants
        )
        assert found == status, shown
        return shown

    return command


@pytest.fixture
def downloaded(program):
    """Names of the files in the Hub's cache."""
    return lambda: {path.name for path in program[1].glob("hub/models--*/snapshots/*/*")}


def check(folder: Path, made) -> dict:
    """Check that the folder is complete and holds peft's merge. Return its record."""
    state = cache.inspect(folder)
    assert state.kind == "ready" and not cache.damaged_files(folder, state)
    merged = {}
    for file in folder.glob("*.safetensors"):
        merged |= load_file(file)
    assert all(torch.equal(merged[name], tensor) for name, tensor in made.merged.items())
    return state.record


def test_download_merge_and_offline_use(hub, run, made_dream, downloaded, cache_folder):
    shown = run("prepare", NAME)
    assert "merging d2f-dream-7b" in shown and "Fetching" in shown  # progress
    record = check(cache_folder / NAME, made_dream)
    assert record["base"] == {
        "source": BASE,
        "requested": None,
        "revision": hub.repositories[BASE].revisions["main"],
    }
    assert record["adapter"]["revision"] == hub.repositories[ADAPTER].revisions["main"]
    assert not any(name.endswith(".py") for name in downloaded())
    assert len(hub.transfers()) == 4  # three shards and the adapter, once each

    # Later uses ask nobody; a merge from what is in the cache works offline.
    requests = len(hub.log)
    assert "ready" in run("prepare", NAME, HF_HUB_OFFLINE=True)
    listed = json.loads(run("models", "--json"))
    (row,) = [row for row in listed if row["name"] == NAME]
    assert row["state"] == "ready" and row["downloads"] > 600_000
    assert row["base_revision"] == record["base"]["revision"]
    shown = run("rm", NAME, HF_HUB_OFFLINE=True)
    assert "freed" in shown and "add --downloads" in shown
    run("prepare", NAME, HF_HUB_OFFLINE=True)
    check(cache_folder / NAME, made_dream)
    assert len(hub.log) == requests
    run("rm", NAME, "--downloads")
    assert not downloaded() and not (cache_folder / NAME).exists()


def test_a_broken_connection_goes_on_where_it_broke(hub, run, made_dream, cache_folder):
    shard = "model-00002-of-00003.safetensors"
    size = (made_dream.base / shard).stat().st_size
    hub.cut[shard] = size // 2
    # A file of this test is smaller than the pieces in which real ones are written.
    run("prepare", NAME, DOWNLOAD_CHUNK_SIZE=1 << 12)
    check(cache_folder / NAME, made_dream)
    ranges = [span for file, span in hub.transfers() if file == shard]
    assert ranges[0] is None and len(ranges) == 2
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= size // 2


def test_a_damaged_transfer_is_fetched_again(hub, run, made_dream, cache_folder):
    """Of the right size, so that only its hash shows it."""
    shard = "model-00003-of-00003.safetensors"
    hub.spoil[shard] = 1
    assert "was damaged, downloading it again" in run("prepare", NAME)
    check(cache_folder / NAME, made_dream)
    hub.spoil[shard] = 99
    run("rm", NAME, "--downloads")
    shown = run("prepare", NAME, status=1)
    assert f"error: {BASE}: {shard} arrived twice with another content" in shown
    assert not (cache_folder / NAME).exists()


def test_an_interrupted_download_is_finished_by_the_next_run(hub, run, made_dream, cache_folder):
    """One file does not come at all: the others are kept, and nothing half is served."""
    shard = "model-00003-of-00003.safetensors"
    hub.missing.add(shard)
    shown = run("prepare", NAME, status=1)
    assert "the download was interrupted" in shown and f"prepare {NAME} --base DIR" in shown
    assert "is not in the cache" in run("prepare", NAME, status=1, HF_HUB_OFFLINE=True)
    assert not (cache_folder / NAME).exists()
    hub.missing.clear()
    hub.log.clear()
    run("prepare", NAME)
    check(cache_folder / NAME, made_dream)
    assert [file for file, _ in hub.transfers()] == [shard]


def test_revisions_are_pinned(hub, run, made_dream, cache_folder):
    repository = hub.repositories[BASE]
    good = repository.revisions["main"]
    files = repository.commits[good]
    spoilt = files | {"config.json": files["config.json"].replace(b"Dream", b"Other")}
    bad = repository.push(spoilt)
    assert bad != good and "'OtherModel'" in run("prepare", NAME, status=1)
    run("prepare", NAME, "--base-revision", good)
    assert check(cache_folder / NAME, made_dream)["base"]["revision"] == good
    assert "is ready" in run("prepare", NAME, "--base-revision", good)
    other = commit_of("other")
    assert "already prepared" in run("prepare", NAME, "--base-revision", other, status=1)
    shown = run("prepare", NAME, "--base-revision", other, "--force", status=1)
    assert f"the Hub has no revision {other}" in shown
    check(cache_folder / NAME, made_dream)


def test_what_does_not_fit_is_refused_before_the_weights_come(hub, run, made_llada):
    hub.repositories[ADAPTER].commits.clear()
    hub.add(ADAPTER, made_llada.adapter)
    assert "which the base does not have" in run("prepare", NAME, status=1)
    assert [file for file, _ in hub.transfers()] == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((401, "GatedRepo"), "licence must be accepted on the Hub"),
        ((404, "RepoNotFound"), "not on the Hub, or private"),
        ((500, "Broken"), f"python -m vllm_d2f prepare {NAME} --base DIR --adapter DIR"),
    ],
)
def test_answers_of_the_hub(hub, run, error, message, cache_folder):
    hub.repositories[BASE].error = error
    assert message in run("prepare", NAME, status=1)
    assert not (cache_folder / NAME).exists()


def test_pickled_adapters_are_not_even_downloaded(hub, run, downloaded):
    files = hub.repositories[ADAPTER].commits[hub.repositories[ADAPTER].revisions["main"]]
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    assert "pickle (adapter_model.bin)" in run("prepare", NAME, status=1)
    assert hub.transfers() == [] and "adapter_model.bin" not in downloaded()


def test_a_hostile_index_asks_for_nothing_else(hub, run):
    files = hub.repositories[BASE].commits[hub.repositories[BASE].revisions["main"]]
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.weight"] = "../../../../.ssh/id.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert "names the file '../../../../.ssh/id.safetensors'" in run("prepare", NAME, status=1)


def test_no_connection_names_both_commands(run, cache_folder):
    shown = run("prepare", NAME, status=1, ENDPOINT="http://127.0.0.1:9")
    assert "the Hub cannot be reached" in shown
    assert f"python -m vllm_d2f prepare {NAME} --base DIR --adapter DIR" in shown
