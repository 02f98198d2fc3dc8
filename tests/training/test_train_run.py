# SPDX-License-Identifier: Apache-2.0
"""Trainings as they run: resumed exactly, killed at any moment, from the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from checkpoints import write_dream
from safetensors.torch import load_file

from training import checkpoint
from training.config import make_config, merged
from training.experiments import main as experiments
from training.export import merged_state
from training.report import read_log
from training.train import set_up, take_whole, train

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


def test_two_batches_accumulated_are_one_of_twice_the_size(tmp_path):
    records = [{"prompt": f"Tom has {i} {i + 1}", "response": f"{i}+{i + 1}"} for i in range(3, 7)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    results = []
    for size, accumulate in ((4, 1), (2, 2)):
        stage = {**STAGE, "steps": 1, "batch_size": size, "accumulate": accumulate, "evaluate": 0}
        values = {**CHAIN, "data": {"source": str(file), "max_length": 64}}
        values["stages"] = {"ar": {"objective": "next_token", **stage}}
        out = tmp_path / f"{size}"
        train(make_config(values), out)
        (entry,) = read_log(out / "ar")
        results.append((entry["loss"], entry["norm"], entry["sequences"]))
    (loss, norm, count), (loss2, norm2, count2) = results
    assert count == count2 == 4
    assert loss2 == pytest.approx(loss, rel=1e-4) and norm2 == pytest.approx(norm, rel=1e-3)


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

    monkeypatch.setattr(checkpoint, "_sync", crash)
    with pytest.raises(OSError, match="disk full"):
        train(config, tmp_path, ("ar",))
    assert checkpoint.progress_of(checkpoint.find(tmp_path / "ar"))["step"] == 2
    # Between the two renames only the old one is there.
    os.rename(tmp_path / "ar" / "checkpoint", tmp_path / "ar" / "checkpoint.old")
    assert checkpoint.progress_of(checkpoint.find(tmp_path / "ar"))["step"] == 2


def command(out, *more):
    return [
        sys.executable, "-m", "training.train", "--config", str(TINY), "--smoke", "--out", str(out),
        "--threads", "1", *more,
    ]  # fmt: skip


def test_killed_training_ends_at_the_same_weights(tmp_path):
    """kill -9 at a random moment of the loop, in a process of its own."""
    slow = ["stages.ar.steps=30", "stages.ar.save_every=3", "--stages", "ar"]
    subprocess.run(command(tmp_path / "whole", *slow), cwd=ROOT, check=True, timeout=600)
    process = subprocess.Popen(command(tmp_path / "killed", *slow), cwd=ROOT)
    deadline = time.monotonic() + 600
    while checkpoint.find(tmp_path / "killed" / "ar") is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(tmp_path / "killed", *slow), cwd=ROOT, check=True, timeout=600)
    assert_equal(weights(tmp_path / "killed", "ar"), weights(tmp_path / "whole", "ar"))


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
