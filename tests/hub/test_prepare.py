# SPDX-License-Identifier: Apache-2.0
"""A name's folder is there whole or not at all, whatever happens while it is written."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import write_adapted, write_dream
from lora import make
from published_runs import DATA
from safetensors.torch import load_file, save_file

from vllm_d2f.__main__ import main, show
from vllm_d2f.hub import HubError, cache, download, names
from vllm_d2f.hub.prepare import MergePlan, ensure, merge, plan_of, prepare, variant_of
from vllm_d2f.models import FAMILIES, PRESETS, PUBLISHED
from vllm_d2f.output import OutputError
from vllm_d2f.settings import settings_from_dict

NAME = "d2f-dream-7b"


def plan(made, **options) -> MergePlan:
    return plan_of(NAME, str(made.base), str(made.adapter), **options)


def leftovers(folder: Path) -> list[str]:
    if not folder.exists():
        return []
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", [name for name, one in PUBLISHED.items() if not one.shipped])
def test_a_published_model_is_consistent(name):
    published = PUBLISHED[name]
    (family,) = (family for family in FAMILIES.values() if name in family.published)
    assert settings_from_dict(published.d2f, family=family).params.block_size >= 1
    assert published.d2f["preset"] in family.preset_names
    assert set(family.preset_names) <= set(PRESETS)
    assert published.licence
    if published.adapter is not None:
        assert variant_of(published.base) == variant_of(published.adapter) == published.variant


def test_the_folder_and_its_record(dream, cache_folder):
    folder = prepare(NAME, plan(dream))
    assert folder == cache_folder / NAME and leftovers(cache_folder) == [NAME]
    state = cache.inspect(folder)
    assert state.kind == "ready" and not cache.damaged_files(folder, state)
    assert state.record["base"]["source"] == str(dream.base)
    assert state.record["adapter"]["source"] == str(dream.adapter)
    assert set(state.record["versions"]) == {"vllm-d2f", "torch", "safetensors"}
    assert {*state.record["files"], cache.RECORD} == {path.name for path in folder.iterdir()}
    assert state.size == sum(path.stat().st_size for path in folder.iterdir())


def test_the_config_carries_the_published_settings(dream):
    config = json.loads((prepare(NAME, plan(dream)) / "config.json").read_text())
    own = json.loads((dream.base / "config.json").read_text())
    changed = {key for key in config | own if config.get(key) != own.get(key)}
    assert changed == {"auto_map", "d2f", "max_seq_len"}
    assert config["d2f"] == {"preset": "dream-gsm8k"} and "auto_map" not in config


def test_the_length_that_dream_was_adapted_at_is_the_limit(tmp_path, monkeypatch):
    made = make(
        write_dream(tmp_path / "Dream-v0-Base-7B", max_positions=8192), tmp_path / "l", olmo=False
    )
    prepare(NAME, plan(made))
    assert engine_config(NAME).model_config.max_model_len == 2048
    assert engine_config(NAME, max_model_len=512).model_config.max_model_len == 512
    with pytest.raises(ValueError, match="VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        engine_config(NAME, max_model_len=4096)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    config = engine_config(NAME, max_model_len=4096).model_config
    assert config.max_model_len == 4096
    assert config.hf_config.max_position_embeddings == 8192  # the size of the rotary table


def test_a_second_use_writes_nothing_and_reads_no_weights(dream, monkeypatch):
    folder = prepare(NAME, plan(dream))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    opened = []
    open_path = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda self, *a, **k: opened.append(self.suffix) or open_path(self, *a, **k),
        )
        patch.setattr(cache, "sha256_of", lambda path: pytest.fail(f"{path} is read as a whole"))
        assert ensure(NAME) == folder and names.resolve(NAME) == str(folder)
    assert ".safetensors" not in opened
    prepare(NAME, plan(dream))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_other_sources_are_not_answered_by_the_old_ones(dream, llada):
    folder = prepare(NAME, plan(dream))
    with pytest.raises(HubError, match="already prepared.*--force"):
        prepare(NAME, plan_of(NAME))
    with pytest.raises(HubError, match="already prepared, with the base"):
        prepare(NAME, plan_of(NAME, str(llada.base), str(dream.adapter)))
    path = dream.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(HubError, match="already prepared, with the adapter"):
        prepare(NAME, plan(dream))
    old = load_file(sorted(folder.glob("*.safetensors"))[1])
    prepare(NAME, plan(dream), force=True)
    new = load_file(sorted(folder.glob("*.safetensors"))[1])
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_a_failed_replacement_keeps_what_was_there(dream):
    folder = prepare(NAME, plan(dream))
    (dream.adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(HubError, match="damaged"):
        prepare(NAME, plan(dream), force=True)
    state = cache.inspect(folder)
    assert state.kind == "ready" and not cache.damaged_files(folder, state)


# ---- damage --------------------------------------------------------------------------------------


def remove(name):
    return lambda folder: next(folder.glob(name)).unlink()


def shorten(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(path, path.stat().st_size - 1)


def rewrite(change):
    def damage(folder):
        path = folder / cache.RECORD
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove("*00002*.safetensors"), "is missing"),
        (remove("config.json"), "config.json is missing"),
        (shorten, "bytes of"),
        (lambda folder: (folder / cache.RECORD).write_text("{"), "not readable"),
        (rewrite(lambda record: []), "not readable"),
        (rewrite(lambda record: record | {"format": 99}), "another version"),
        (rewrite(lambda record: record | {"files": {}}), "no config.json"),
        (
            rewrite(lambda r: r | {"files": r["files"] | {"../x": {"size": 1, "sha256": ""}}}),
            "is missing",
        ),
    ],
)
def test_a_damaged_folder_is_never_served(dream, damage, reason):
    folder = prepare(NAME, plan(dream))
    damage(folder)
    for attempt in (lambda: names.resolve(NAME), lambda: prepare(NAME, plan(dream))):
        with pytest.raises(HubError, match=reason) as error:
            attempt()
        assert f"python -m vllm_d2f rm {NAME}" in str(error.value)


def test_a_folder_of_someone_else_is_not_touched(dream, cache_folder, command, capsys):
    (cache_folder / NAME).mkdir(parents=True)
    (cache_folder / NAME / "mine.txt").write_text("mine")
    for attempt in (
        lambda: names.resolve(NAME),
        lambda: prepare(NAME, plan(dream)),
        lambda: prepare(NAME, plan(dream), force=True),
    ):
        with pytest.raises(OutputError, match="vllm-d2f did not write it"):
            attempt()
    assert "vllm-d2f did not write it" in command("rm", NAME, status=1)
    assert main(["models"]) == 1 and "damaged" in capsys.readouterr().out
    assert (cache_folder / NAME / "mine.txt").read_text() == "mine"


def test_a_changed_byte_is_found_by_the_checksum(dream):
    folder = prepare(NAME, plan(dream))
    path = sorted(folder.glob("*.safetensors"))[2]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cache.damaged_files(folder, cache.inspect(folder)) == [path.name]


def test_merge_to_a_folder_of_ones_own(dream, tmp_path):
    out = tmp_path / "own" / "model"
    own = MergePlan(str(dream.base), str(dream.adapter), d2f={"block_size": 8, "max_blocks": 2})
    assert merge(out, own) == out
    assert json.loads((out / "config.json").read_text())["d2f"] == own.d2f
    assert names.resolve(str(out)) == str(out)
    with pytest.raises(HubError, match="exists.*--force"):
        merge(out, own)
    merge(out, own, force=True)
    (tmp_path / "own" / "model.lock").write_text("mine")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="precious: exists, and vllm-d2f did not write it"):
        merge(tmp_path / "precious", own, force=True)
    assert leftovers(tmp_path / "precious") == ["mine.txt"]
    merge(out, own, force=True)
    assert leftovers(out.parent) == ["model", "model.lock"], "no lock of ours is left"
    assert (out.parent / "model.lock").read_text() == "mine"
    with pytest.raises(HubError, match="cannot be written .*; name another --out"):
        merge(tmp_path / "precious" / "mine.txt" / "out", own)
    with pytest.raises(HubError, match="unknown setting 'blocks'"):
        merge(tmp_path / "x", MergePlan(own.base, own.adapter, d2f={"blocks": 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(base="/no/such"), "no such folder, and not a Hub id"),
        (dict(base="no-such"), "no such folder, and not a Hub id"),
        (dict(adapter="../x/y"), "no such folder, and not a Hub id"),
        (dict(base_revision="main"), "--base-revision is for a Hub id"),
    ],
)
def test_wrong_sources(dream, tmp_path, change, message):
    sources = dict(base=str(dream.base), adapter=str(dream.adapter)) | change
    with pytest.raises(HubError, match=message):
        merge(tmp_path / "out", MergePlan(**sources))


# ---- full disks ----------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_anything_is_written(dream, cache_folder, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HubError, match="not enough disk space.*D2F_CACHE"):
        prepare(NAME, plan(dream))
    assert leftovers(cache_folder) == []


def test_a_disk_that_fills_up_leaves_nothing(dream, cache_folder):
    """The kernel refuses to let a file grow, as a full disk or a quota would."""
    largest = max(file.stat().st_size for file in dream.base.glob("*.safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 4096, hard))
    try:
        with pytest.raises(HubError, match="the disk filled up"):
            prepare(NAME, plan(dream))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert leftovers(cache_folder) == []
    assert cache.inspect(prepare(NAME, plan(dream))).kind == "ready"


@pytest.mark.stress
def test_the_command_on_a_disk_that_fills_up(dream, tmp_path):
    """Status 1 and what to do; nothing is left, and with space the same command succeeds."""
    out = tmp_path / "out" / "merged"
    command = [sys.executable, "-m", "vllm_d2f", "merge", "--base", str(dream.base)]
    command += ["--adapter", str(dream.adapter), "--out", str(out)]
    largest = max(file.stat().st_size for file in dream.base.glob("*.safetensors"))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 4096,) * 2)

    full = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert full.returncode == 1
    assert "the disk filled up" in full.stderr and "name another --out" in full.stderr
    assert "D2F_CACHE" not in full.stderr and list(out.parent.iterdir()) == []
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_cache_that_cannot_be_written(dream, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HubError, match="cannot be written.*D2F_CACHE"):
        prepare(NAME, plan(dream))


# ---- kill -9 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base whose merge takes long enough to be hit anywhere: some 40 MB in three files."""
    folder = tmp_path_factory.mktemp("large")
    base = write_dream(
        folder / "Dream-v0-Base-7B", hidden=256, layers=8, intermediate=1024, heads=8, shards=3
    )
    return make(base, folder / "lora", olmo=False)


def fork_prepare(made) -> int:
    """Prepare in a child, which has everything imported already, and return its process id."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            prepare(NAME, plan(made), force=True)
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.stress)])
def test_killed_at_any_moment(large, cache_folder, kills):
    folder = cache_folder / NAME
    duration = math.inf
    for _ in range(3):  # the fastest: a pause of the machine must not put all kills past the end
        started = time.perf_counter()
        os.waitpid(fork_prepare(large), 0)
        duration = min(duration, time.perf_counter() - started)
    assert cache.inspect(folder).kind == "ready"
    rng = random.Random(1)
    interrupted = kept = 0
    for attempt in range(20 * kills):
        if attempt >= kills and interrupted >= kills // 4 and kept:
            break
        if attempt % 2:  # every other time there is nothing yet, so that a half would show
            cache.remove_folder(folder) if folder.exists() else None
        child = fork_prepare(large)
        time.sleep(rng.random() * duration * 1.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += bool(cache.parts_of(folder))
        state = cache.inspect(folder)
        if state.kind == "ready":
            kept += 1
            assert not cache.damaged_files(folder, state)
            assert names.resolve(NAME) == str(folder)
        else:
            assert state.kind == "absent", state.reason
        for part in cache.parts_of(folder):
            assert cache.inspect(part).kind == "damaged" or (part / cache.RECORD).exists()
            with pytest.raises(names.UnknownModelError, match="unfinished"):
                names.refuse_unservable(str(part))
    assert interrupted and kept, "no kill hit the merge, or all did"
    prepare(NAME, plan(large), force=True)
    assert leftovers(cache_folder) == [NAME]
    merged = {}
    for file in folder.glob("*.safetensors"):
        merged |= load_file(file)
    assert all(torch.equal(merged[name], tensor) for name, tensor in large.merged.items())


def test_two_at_once(large, cache_folder):
    children = [fork_prepare(large) for _ in range(3)]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    folder = cache_folder / NAME
    state = cache.inspect(folder)
    assert state.kind == "ready" and not cache.damaged_files(folder, state)
    assert leftovers(cache_folder) == [NAME]


# ---- names and options ---------------------------------------------------------------------------


def test_offline_and_not_prepared_names_both_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in PUBLISHED:
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as error:
            names.resolve(name)
        text = str(error.value)
        assert f"python -m vllm_d2f prepare {name}\n" in text
        whole = PUBLISHED[name].shipped or not PUBLISHED[name].adapter
        folders = "--base DIR" if whole else "--base DIR --adapter DIR"
        assert text.endswith(f"python -m vllm_d2f prepare {name} {folders}")
        assert all(repository in text for repository in PUBLISHED[name].repositories)


def test_a_whole_model_is_copied_without_an_adapter(tmp_path, cache_folder):
    """Its config says the family's model_type, whatever the published one says."""
    base = write_adapted(tmp_path / "base", "Llama")
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama"}
    (base / "config.json").write_text(json.dumps(config))
    name = "stable-diffcoder-8b"
    folder = prepare(name, plan_of(name, str(base)))
    state = cache.inspect(folder)
    assert state.kind == "ready" and not cache.damaged_files(folder, state)
    assert "adapter" not in state.record and prepare(name, plan_of(name, str(base))) == folder
    weights, copied = (load_file(path / "model.safetensors") for path in (base, folder))
    assert all(torch.equal(weights[key], copied[key]) for key in weights | copied)
    served = engine_config(name, skip_tokenizer_init=True).model_config.hf_config
    assert served.family.name == "stable_diffcoder" and served.d2f["block_origin"] == "zero"
    served = engine_config(base).model_config.hf_config  # the published folder itself
    assert served.family.name == "stable_diffcoder" and served.d2f["cut_last_block"] == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("inclusionAI/LLaDA2.1-mini", "edit tokens"),
        ("/cache/models--inclusionAI--LLaDA2.2-flash/snapshots/0", "edit tokens"),
        ("d3LLM/d3LLM_Dream", "both directions"),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_the_reason(name, reason):
    with pytest.raises(names.UnknownModelError, match=reason):
        names.refuse_unservable(name)
    names.refuse_unservable("inclusionAI/LLaDA2.0-mini")


def test_a_folder_of_another_name_is_known_by_its_model_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n# LLaDA2.0-mini\nCompare LLaDA2.1-mini.\n")
    names.refuse_unservable(str(tmp_path))
    card.write_text("---\nlicense: apache-2.0\n---\n# LLaDA2.1-mini\nIt edits.\n")
    with pytest.raises(names.UnknownModelError, match="edit tokens"):
        names.refuse_unservable(str(tmp_path))


def test_a_folder_without_a_name_is_known_by_the_code_in_it(tmp_path):
    shutil.copytree(DATA / "llada2", tmp_path, dirs_exist_ok=True)
    code = tmp_path / "modeling_llada2_moe.py"
    code.write_text("def generate(self, inputs, threshold=0.95): ...\n")
    assert engine_config(tmp_path, skip_tokenizer_init=True).model_config.hf_config.d2f
    code.write_text("def generate(self, inputs, threshold=0.95, editing_threshold=0.9): ...\n")
    with pytest.raises(ValueError, match="LLaDA2.1 edits decoded tokens"):
        engine_config(tmp_path, skip_tokenizer_init=True)


def engine_config(model, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), dtype="float32", **options).create_engine_config()


def test_an_adapter_alone_is_refused_with_the_command(dream):
    with pytest.raises(ValueError, match="python -m vllm_d2f merge --base") as error:
        engine_config(dream.adapter)
    assert str(dream.adapter) in str(error.value)
    with pytest.raises(names.UnknownModelError, match="vllm serve d2f-dream-7b"):
        names.refuse_unservable(PUBLISHED[NAME].adapter)
    # As the tokenizer's folder of some other model it is none of our business.
    assert names.resolve(str(dream.adapter)) == str(dream.adapter)


def test_a_revision_does_not_vanish(dream):
    prepare(NAME, plan(dream))
    with pytest.raises(ValueError, match="--base-revision"):
        engine_config(NAME, revision="abc")


def test_an_unmerged_adapter_is_refused_with_the_command(dream):
    folder = prepare(NAME, plan(dream))
    with pytest.raises(ValueError, match="python -m vllm_d2f merge --base") as error:
        engine_config(folder, enable_lora=True)
    assert str(folder) in str(error.value)


def test_the_engine_serves_the_name(dream):
    folder = prepare(NAME, plan(dream))
    config = engine_config(NAME)
    assert config.model_config.model == str(folder)
    assert config.model_config.served_model_name == NAME
    assert not config.model_config.trust_remote_code
    assert config.model_config.hf_config.d2f["tau_add"] == 0.1


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """`python -m vllm_d2f ARGUMENTS` in this process, with an empty Hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(arguments) == status
        shown = capsys.readouterr()
        return shown.err if status else shown.out

    return run


def test_the_command_from_first_to_last(dream, llada, tmp_path, command):
    listed = {row["name"]: row for row in json.loads(command("models", "--json"))}
    assert set(listed) == set(names.known_names())
    assert listed["d2f-tiny"]["state"] == "embedded" and listed["d2f-tiny"]["size"] > 3e6
    assert listed[NAME]["state"] == "absent" and listed[NAME]["size"] == 0

    sources = ("--base", str(dream.base), "--adapter", str(dream.adapter))
    assert f"vllm serve {NAME}" in command("prepare", NAME, *sources)
    shown = command("models", "--check")
    (line,) = [line for line in shown.splitlines() if line.startswith(NAME)]
    assert "ready" in line and "kB" in line
    entry = shown.partition(f"\n{NAME} ")[2].partition("\nd2f-")[0]
    assert str(dream.base) in entry and "disk space" not in entry
    assert "family dream, preset dream-gsm8k, 15.3 GB of memory" in entry
    assert "needs about 32.2 GB of disk space" in shown

    other = ("--base", str(dream.base), "--adapter", str(llada.adapter))
    assert "expected LLaDAModelLM" in command("prepare", "d2f-llada-8b", *other, status=1)
    assert "ships with the package" in command("rm", "d2f-tiny", status=1)
    assert "unknown model name" in command("rm", "d2f-x", status=1)
    assert "freed 6" in command("rm", NAME)
    assert command("rm", NAME) == f"there is no merged {NAME} to free\n"
    assert not cache.folder_of(NAME).exists()

    out = tmp_path / "out"
    section = '{"preset": "dream-math"}'
    assert f"vllm serve {out}" in command("merge", *sources, "--out", str(out), "--d2f", section)
    assert json.loads((out / "config.json").read_text())["d2f"] == json.loads(section)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "d2f-x"], "d2f-llada-8b"),
        (["merge", "--out", "x"], "--base"),
        (["merge", "--base", "x", "--adapter", "y", "--out", "z", "--d2f", "[]"], "JSON object"),
        (["fly"], "prepare"),
        (["models", "--x"], "--x"),
    ],
)
def test_wrong_arguments_say_what_is_right(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_report(capsys):
    secrets = {"HF_TOKEN": "hf_secret", "VLLM_API_KEY": "sk-secret", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_d2f", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | secrets,
    )
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout
    found = json.loads(done.stdout)
    assert found["models"]["d2f-llada-8b"] == "absent"
    assert found["patches"]["p05_model_names"] == "applied"
    assert found["settings"]["defaults"]["block_size"] == 32
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    show(found)
    shown = capsys.readouterr().out
    assert shown.startswith("vllm-d2f ") and "patch p05_model_names: applied" in shown
    assert "d2f-tiny (embedded)" in shown and f"{NAME} (absent)" in shown
    assert f"torch: {found['versions']['torch']}" in shown and found["platform"] in shown
