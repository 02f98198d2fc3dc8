# SPDX-License-Identifier: Apache-2.0
"""`--quick` of the two benchmarks that hold the engine to the reference and to its time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overhead, parity, serving
from training.arithmetic import problems

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"command", "seed", "versions", "hardware"}


def run(module, path, *arguments):
    """Return the benchmark's JSON and exit status."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--json", str(path)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert path.exists(), done.stderr[-3000:]
    assert str(path.parent) not in path.read_text()
    return json.loads(path.read_text()), done.returncode


@pytest.mark.parametrize(
    ("main", "arguments", "hint"),
    [
        (parity.main, ["--model", "/no/such/folder"], "--model"),
        (parity.main, ["--model", "ar-tiny"], "no D2F model"),
        (parity.main, ["--data", "/no/such/file"], "--data"),
        (parity.main, ["--head-size", "40"], "heads of 32 do not divide 40"),
        (overhead.main, ["--model", "/no/such/folder"], "--model"),
        (serving.main, ["--streaming", "--models", "/no/such/folder"], "--models"),
        (serving.main, ["--streaming", "--models", "ar-tiny"], "no D2F model"),
    ],
)
def test_what_is_missing_is_said(main, arguments, hint, capsys):
    assert main([*arguments, "--quick"]) == 2
    assert hint in capsys.readouterr().err


def test_too_many_steps_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        overhead.parse(["--steps", "27"])
    assert "1 to 26" in capsys.readouterr().err


@pytest.mark.slow
def test_parity_quick(tmp_path):
    report, status = run("parity", tmp_path / "parity.json")
    assert ABOUT | {"model", "ways", "tokens_per_forward", "machine"} <= report.keys()
    assert report["ways"].keys() == set(parity.WAYS) and report["prompts"] == 6
    assert all(way["equal"] + way["ties"] == way["of"] == 6 for way in report["ways"].values())
    assert report["tokens_per_forward"] > 1
    assert status == 0


@pytest.mark.slow
def test_parity_of_block_causal_prompts_asked_as_a_chat(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(ROOT / "vllm_d2f" / "embedded" / "d2f-tiny", model)
    config = json.loads((model / "config.json").read_text())
    config["d2f"]["prompt_attention"] = "block_causal"
    (model / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": p.question, "response": p.answer} for p in problems("test", 6, 0)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", str(model), "--chat", "--data", str(data)]
    ways = ["--ways", "batch", "arrivals", "bfloat16"]
    report, status = run("parity", tmp_path / "parity.json", *given, *ways)
    assert report["ways"].keys() == {"batch", "arrivals"} and status == 0
    assert all(way["equal"] + way["ties"] == way["of"] == 6 for way in report["ways"].values())
    assert report["bfloat16"]["of"] == 6 and report["bfloat16"]["equal_tokens"] > 0.5


@pytest.mark.slow
def test_parity_of_larger_heads(tmp_path):
    given = ["--head-size", "64", "--ways", "batch"]
    report, status = run("parity", tmp_path / "parity.json", *given)
    assert status == 0 and report["head_size"] == 64
    assert report["ways"]["batch"]["equal"] + report["ways"]["batch"]["ties"] == 6
    assert "padded to 64" in (tmp_path / "parity.md").read_text()


@pytest.mark.slow
def test_overhead_quick(tmp_path):
    # The exit status tells whether the limits are kept, which a busy machine decides too.
    report, _ = run("overhead", tmp_path / "overhead.json")
    assert ABOUT | {"rows", "units", "threads", "window"} <= report.keys()
    assert [row["requests"] for row in report["rows"]] == [1, 8]
    for row in report["rows"]:
        assert row["steps"] == 6 and row["added_cpu_ms"] >= 0
        assert {"sampler", "model state", "scheduler", "model"} <= row["cpu_ms"].keys()
        assert row["cpu_ms"]["model"] > 0
