# SPDX-License-Identifier: Apache-2.0
"""Trainings as they run: resumed exactly, killed at any moment, from the command line."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from checkpoints import write_dream
from safetensors.torch import load_file

import training.train as train_module
import training.trainer as module
from training import checkpoint
from training.config import ConfigError, load_config, make_config, merged
from training.experiments import main as experiments
from training.export import merged_state
from training.report import read_log
from training.train import train
from training.trainer import set_up, take_whole

ROOT = Path(__file__).parents[2]
TINY = ROOT / "training" / "configs" / "tiny.yaml"
STAGE = {
    "steps": 6,
    "batch_size": 4,
    "save_every": 2,
    "log_every": 1,
    "evaluate_every": 3,
    "evaluate": 2,
    "optimizer": {"name": "muon", "lr": 1e-3, "schedule": "cosine", "warmup": 2},
}
CHAIN = {
    "name": "test",
    "model": {"sizes": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}},
    "data": {"step_counts": [2, 3], "extra_blocks": [1, 1], "max_length": 96},
    "stages": {
        "ar": {"objective": "next_token", **STAGE},
        "teacher": {"objective": "diffusion", "start": "ar", **STAGE},
        "student": {"objective": "d2f", "start": "teacher", "export": "d2f", **STAGE},
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def weights(out, stage="student"):
    return load_file(out / stage / "final.safetensors")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    train(make_config(CHAIN), out)
    return out


def test_interrupted_chain_ends_at_the_same_weights(whole, tmp_path):
    config = make_config(CHAIN)
    for stage in config.stages:
        for steps in (1, 3, 5):
            train(config, tmp_path, (stage,), stop_after=steps)
        assert not (tmp_path / stage / "done.json").exists()
        train(config, tmp_path, (stage,))
    for stage in config.stages:
        assert_equal(weights(tmp_path, stage), weights(whole, stage))
        ours, theirs = read_log(tmp_path / stage), read_log(whole / stage)
        assert [e["step"] for e in ours] == [e["step"] for e in theirs]
        assert [e["loss"] for e in ours] == [e["loss"] for e in theirs]
    before = (tmp_path / "student" / "final.safetensors").stat().st_mtime_ns
    train(config, tmp_path)  # everything is done: nothing happens
    assert (tmp_path / "student" / "final.safetensors").stat().st_mtime_ns == before


def test_training_changes_the_weights_and_lowers_the_loss(whole):
    assert not torch.equal(
        weights(whole, "teacher")["lm_head.weight"], weights(whole)["lm_head.weight"]
    )
    log = read_log(whole / "ar")
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"exact", "final", "tokens_per_forward"} <= read_log(whole / "student")[-1].keys()


def test_other_settings_do_not_mix(whole):
    changed = merged(CHAIN, {"stages": {"student": {"seed": 9}}})
    with pytest.raises(ValueError, match="other settings.*use another --out"):
        train(make_config(changed), whole, ("student",))


def test_missing_earlier_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage teacher first"):
        train(make_config(CHAIN), tmp_path, ("student",))


def test_batches_accumulated_are_one_of_their_size(tmp_path):
    # Of different lengths: a mean of means would be another loss.
    answers = ("3", "4+5=9", "5", "6+7=13+8=21")
    records = [{"prompt": f"Tom has {a[0]}", "response": a} for a in answers]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    results = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        stage = {**STAGE, "steps": 1, "batch_size": size, "accumulate": accumulate, "evaluate": 0}
        stage["optimizer"] = {"lr": 1e-3, "eps": 1e-2, "clip": 1e9}  # no sign of a rounding error
        values = {**CHAIN, "data": {"source": str(file), "max_length": 64}}
        values["stages"] = {"ar": {"objective": "next_token", **stage}}
        out = tmp_path / f"{size}"
        train(make_config(values), out)
        (entry,) = read_log(out / "ar")
        results.append((entry["loss"], entry["norm"], entry["sequences"]))
    (_, norm, count), *others = results
    for _, norm2, count2 in others:
        assert count == count2 == 4 and norm2 == pytest.approx(norm, rel=1e-4)
    first, *rest = [weights(tmp_path / size, "ar") for size in "421"]
    for other in rest:
        for name, tensor in first.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


LORA = {
    "name": "lora",
    "decoding": {"block_size": 8, "max_blocks": 2, "max_tokens": 16},
    "stages": {
        "student": {
            **STAGE,
            "objective": "d2f",
            "optimizer": {"lr": 1e-2},
            "lora": {"r": 4, "alpha": 4, "dropout": 0.1},
            "loss": {"block_size": 8},
            "accumulate": 2,
            "batch_size": 2,
            "export": "merged",
        }
    },
}


def lora_config(tmp_path, **stage):
    base = write_dream(tmp_path / "base")
    if not (tmp_path / "data.jsonl").exists():
        rng = random.Random(0)
        words = [chr(97 + i) for i in range(26)]
        record = lambda: {"prompt": " ".join(rng.choices(words, k=4)), "response": "a b c"}  # noqa: E731
        (tmp_path / "data.jsonl").write_text(
            "".join(json.dumps(record()) + "\n" for _ in range(20))
        )
    data = {"source": str(tmp_path / "data.jsonl"), "max_length": 64}
    data["validation"] = data["source"]
    values = merged(LORA, {"model": {"base": str(base)}, "data": data})
    return make_config(merged(values, {"stages": {"student": stage}}))


def test_lora_training_resumes_exactly_and_keeps_the_base(tmp_path):
    config = lora_config(tmp_path)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_after=3)
    saved = load_file(tmp_path / "parts" / "student" / "checkpoint" / "model.safetensors")
    assert saved and all("lora_" in name for name in saved), "checkpoints hold no base weights"
    train(config, tmp_path / "parts")
    ours, theirs = (
        load_file(tmp_path / name / "models" / "merged" / "model.safetensors")
        for name in ("whole", "parts")
    )
    assert_equal(ours, theirs)  # dropout's random state is part of the checkpoint
    again = set_up(config, "student", tmp_path / "whole", Accelerator(), "eager")
    assert_equal(
        {n: t for n, t in merged_state(again.predictor.net).items() if n in ours},
        {n: t for n, t in ours.items() if n in merged_state(again.predictor.net)},
    )
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, base[name])}
    assert changed and all(name.split(".")[-2] in "q_proj k_proj v_proj o_proj" for name in changed)


def test_a_training_goes_on_with_what_it_was_begun_with_only(tmp_path):
    """Other records or other weights under the same name stop it; brought back it goes on."""
    config, out = lora_config(tmp_path, evaluate_every=100), tmp_path / "out"
    train(config, out, stop_after=1)
    for file, fields in (
        (tmp_path / "data.jsonl", "data.validation, data.source"),
        (tmp_path / "base" / "model.safetensors", "model.base"),
    ):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"a b c", b"a b d", 1))
        if file.suffix == ".safetensors":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"begun with another content of {fields};.*--out"):
            train(config, out)
        assert checkpoint.progress_of(checkpoint.find(out / "student"))["step"] == 1
        file.write_bytes(content)
    train(config, out, stop_after=2)
    # A training that an earlier version began has no fingerprints, and gets them.
    (out / "student" / "inputs.json").unlink()
    train(config, out, stop_after=3)
    assert (out / "student" / "inputs.json").exists()


def test_a_stage_goes_on_from_the_stage_that_it_began_with(whole, tmp_path):
    shutil.copytree(whole / "teacher", tmp_path / "teacher")
    train(make_config(CHAIN), tmp_path, ("student",), stop_after=1)
    shutil.copy(whole / "ar" / "final.safetensors", tmp_path / "teacher")
    with pytest.raises(ValueError, match="another content of stages.student.start;"):
        train(make_config(CHAIN), tmp_path, ("student",))


def test_a_disk_that_fills_up_is_named_and_nothing_is_lost(tmp_path):
    """torch says `unexpected pos` of it. With space the same command goes on."""
    lora_config(tmp_path)
    values = {
        "name": "full",
        "model": {"base": str(tmp_path / "base")},
        "data": {"source": str(tmp_path / "data.jsonl"), "max_length": 64},
        "stages": {"s": {"objective": "d2f", "steps": 2, "batch_size": 2, "evaluate": 0}},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-m", "training.train", "--config", str(tmp_path / "c.yaml")]
    command += ["--out", str(tmp_path / "out")]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    full = subprocess.run(command, preexec_fn=limit, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "the disk is full" in full.stderr and "run the same command again" in full.stderr
    assert {p.name for p in (tmp_path / "out" / "s").iterdir()} <= {
        "settings.json",
        "inputs.json",
        "log.jsonl",
    }, "no half of a checkpoint takes space"


def test_gathered_weights_make_a_model_of_one_piece(tmp_path):
    """What sharded training does at its end, from weights that one process gathered."""
    config = lora_config(tmp_path)
    run = set_up(config, "student", tmp_path / "out", Accelerator(), "eager")
    assert run.predictor._no_split_modules
    with torch.no_grad():
        for parameter in run.predictor.parameters():
            parameter.add_(0.25)
    state = {f"module.{k}": v.clone() for k, v in run.predictor.state_dict().items()}
    before = run.predictor
    take_whole(run, state)
    assert run.predictor is not before
    assert_equal(run.predictor.state_dict(), before.state_dict())


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    config = make_config(CHAIN)
    train(config, tmp_path, ("ar",), stop_after=2)
    good = checkpoint.find(tmp_path / "ar")
    assert good is not None and checkpoint.progress_of(good)["step"] == 2

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "sync", crash)
    with pytest.raises(OSError, match="disk full"):
        train(config, tmp_path, ("ar",))
    assert checkpoint.progress_of(checkpoint.find(tmp_path / "ar"))["step"] == 2
    # Between the two renames only the old one is there.
    os.rename(tmp_path / "ar" / "checkpoint", tmp_path / "ar" / ".checkpoint.old")
    assert checkpoint.progress_of(checkpoint.find(tmp_path / "ar"))["step"] == 2

    def killed(source, target):
        raise KeyboardInterrupt

    # Killed between them again: the old one must not go before the new one counts.
    monkeypatch.undo()
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(Accelerator(), tmp_path / "ar", {"step": 4})
    assert checkpoint.find(tmp_path / "ar") is not None


def test_what_a_kill_tore_is_mended(tmp_path):
    """A cut line of the log, and a checkpoint made by another number of processes."""
    config = make_config(CHAIN)
    train(config, tmp_path, ("ar",), stop_after=2)
    log = tmp_path / "ar" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')
    train(config, tmp_path, ("ar",), stop_after=4)
    assert [e["step"] for e in read_log(tmp_path / "ar")] == [1, 2, 3, 4]
    progress = tmp_path / "ar" / "checkpoint" / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "processes": 8}))
    with pytest.raises(ValueError, match="begun with 8 processes"):
        train(config, tmp_path, ("ar",))


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, monkeypatch):
    def broken(*args):
        loss = next_token_loss(*args)
        return replace(loss, summed=loss.summed * float("nan"))

    config = make_config(CHAIN)
    train(config, tmp_path, ("ar",), stop_after=2)
    next_token_loss = module.next_token_loss
    monkeypatch.setattr(module, "next_token_loss", broken)
    with pytest.raises(ValueError, match="at update 3 the loss is nan.*smaller optimizer.lr"):
        train(config, tmp_path, ("ar",))
    assert checkpoint.progress_of(checkpoint.find(tmp_path / "ar"))["step"] == 2


def test_trackers_are_written_or_refused(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    values = merged(CHAIN, {"trackers": ["tensorboard"], "stages": {"ar": {"evaluate": 0}}})
    train(make_config(values), tmp_path / "a", ("ar",), stop_after=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (tmp_path / "a").rglob("*tfevents*") if
                 "hparam" not in str(file) and file.parent.name == "test"}  # fmt: skip
    events = EventAccumulator(str(folder))
    events.Reload()
    written = [event.value for event in events.Scalars("ar/loss")]
    assert written == pytest.approx([e["loss"] for e in read_log(tmp_path / "a" / "ar")], rel=1e-4)
    monkeypatch.setattr(train_module.importlib.util, "find_spec", lambda name: None)
    wanted = make_config(merged(CHAIN, {"trackers": ["wandb"]}))
    with pytest.raises(ConfigError, match="wandb is not installed; pip install wandb"):
        train(wanted, tmp_path / "b", ("ar",))
    assert not (tmp_path / "b").exists()


SMOKE = ["stages.ar.steps=20", "stages.ar.save_every=2", "stages.ar.evaluate=0"]
PATIENCE = 1200
"""Seconds; a loaded machine takes minutes to import torch."""


def smoke(out, *more):
    """Arguments of the smoke recipe's first stage."""
    return [
        "-m", "training.train", "--config", str(TINY), "--smoke", "--stages", "ar", *SMOKE,
        "--out", str(out), *more,
    ]  # fmt: skip


def test_killed_training_ends_at_the_same_weights(tmp_path):
    """kill -9 at a random moment of the loop, in a process of its own."""
    config = load_config(TINY, SMOKE, "smoke")
    train(config, tmp_path / "whole", ("ar",))
    killed = [sys.executable, *smoke(tmp_path / "killed", "--threads", "1")]
    process = subprocess.Popen(killed, cwd=ROOT)
    try:
        deadline = time.monotonic() + PATIENCE
        while checkpoint.find(tmp_path / "killed" / "ar") is None:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(random.Random().uniform(0, 0.5))
    finally:
        process.kill()
        process.wait()
    train(config, tmp_path / "killed", ("ar",))
    assert_equal(weights(tmp_path / "killed", "ar"), weights(tmp_path / "whole", "ar"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["next_token", "d2f"])
def test_two_processes_train_as_one_that_accumulates(tmp_path, objective):
    """DDP over gloo: same batches, same losses, same weights.

    Started by torch, because `accelerate launch` wants MPI for several processes on CPUs; what it
    sets for a process is the same.
    """
    changes = [f"stages.ar.objective={objective}", "stages.ar.precision=float32",
               "stages.ar.optimizer={name: adamw, lr: 1.0e-3, eps: 1.0e-2}"]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc_per_node", "2"]  # fmt: skip
    both = smoke(tmp_path / "two", "--threads", "1", *changes)
    subprocess.run([*launch, *both], cwd=ROOT, check=True, timeout=PATIENCE,
                   env={**os.environ, "ACCELERATE_USE_CPU": "true"})  # fmt: skip
    config = load_config(TINY, [*SMOKE, *changes, "stages.ar.accumulate=2"], "smoke")
    train(config, tmp_path / "one", ("ar",))
    two, one = read_log(tmp_path / "two" / "ar"), read_log(tmp_path / "one" / "ar")
    assert len(one) == 10
    for entry, other in zip(two, one, strict=True):
        assert entry["sequences"] == other["sequences"] == entry["step"] * 16
        for name in ("loss", "norm"):
            assert entry[name] == pytest.approx(other[name], rel=1e-4), (entry["step"], name)
    ours, theirs = weights(tmp_path / "two", "ar"), weights(tmp_path / "one", "ar")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def test_experiments_run_resume_and_report(whole, tmp_path):
    plan = {
        "config": merged(
            {k: CHAIN[k] for k in ("name", "model", "data")},
            {
                "stages": {
                    "teacher": {"objective": "diffusion", "steps": 1, "evaluate": 0},
                    "student": {"objective": "d2f", "start": "teacher", **STAGE, "evaluate": 0},
                }
            },
        ),
        "seeds": [1, 2],
        "thresholds": [0.5, 0.9],
        "problems": 3,
        "variants": {"default": {}, "reverse": {"loss": {"kl": "reverse"}}},
        "groups": {"kl": {"variants": ["default", "reverse"], "decode": [8, 16], "text": "Words."}},
    }
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(plan))
    teacher = whole / "teacher" / "final.safetensors"
    results = tmp_path / "results"
    arguments = ["--config", str(file), "--teacher", str(teacher), "--out", str(tmp_path / "w"),
                 "--results", str(results)]  # fmt: skip
    experiments([*arguments, "--variants", "default"])
    changed = tmp_path / "changed.yaml"
    changed.write_text(json.dumps({**plan, "problems": 4}))
    with pytest.raises(SystemExit, match="another content of variants.default"):
        experiments([*arguments, "--config", str(changed)])
    other = ["--teacher", str(whole / "ar" / "final.safetensors")]
    with pytest.raises(SystemExit, match="another content of --teacher"):
        experiments([*arguments, *other])
    experiments(arguments)
    report = json.loads(results.with_suffix(".json").read_text())
    runs = {(r["variant"], r["seed"]) for r in report["runs"]}
    assert len(report["runs"]) == 4 and len(runs) == 4
    assert len(report["table"]) == 2 * 2 * 2
    for row in report["table"]:
        assert row["seeds"] == 2 and 0 <= row["exact"]["mean"] <= 100
        assert row["tokens_per_forward"]["mean"] > 0
    text = results.with_suffix(".md").read_text()
    assert "| reverse | 8 |" in text and "Words." in text
    assert results.with_suffix(".png").stat().st_size > 5000
    losses = {r["variant"]: r["loss_content"] for r in report["runs"] if r["seed"] == 1}
    assert losses["default"] != losses["reverse"]
