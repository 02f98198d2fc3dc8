# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against the server that runs already: vLLM's own `vllm bench serve`, and lm-eval."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from http_server import MODEL

from vllm_d2f.watch.__main__ import QUESTION

ROOT = Path(__file__).resolve().parents[2]


def run(module, path, *arguments):
    """Return the benchmark's JSON."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--json", str(path)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(path.parent) not in path.read_text()
    return json.loads(path.read_text())


def test_vllm_bench_serve(server, tmp_path):
    report = run("serving", tmp_path / "serving.json", "--base-url", server.url, "--models", MODEL)
    assert {"scores", "versions", "hardware", "command", "seed", "units", "runs"} <= report.keys()
    assert report["scores"][MODEL]["final"] >= 0.75
    found = report["models"][MODEL]
    assert found["simulated_tokens_per_forward"] is None
    (point,) = found["points"]
    assert (point["completed"], point["failed"], point["runs"]) == (8, 0, 1)
    # Scored twice: as /v1/completions answers, and as the answers that were timed.
    assert point["score"] == report["scores"][MODEL]
    assert 1 < point["tokens_per_forward"] < 64
    low, high = point["spread"]["tokens_per_s"]
    assert 0 < low <= point["tokens_per_s"] <= high
    assert 0 < point["first_token_ms"]["p50"] <= point["request_ms"]["p50"]
    assert point["request_ms"]["p50"] <= point["request_ms"]["p99"]
    assert f"| {MODEL} | 8 |" in (tmp_path / "serving.md").read_text()
    assert (tmp_path / "serving.png").stat().st_size > 5000


@pytest.mark.slow
def test_lm_eval_with_settings_in_each_request(server, tmp_path):
    """`evaluate --server`: a preset's settings travel as `vllm_xargs`."""
    pytest.importorskip("lm_eval")
    address = ("--server", server.url, "--model", MODEL)
    report = run("evaluate", tmp_path / "own.json", *address)
    assert (report["problems"], report["through"]) == (8, "local-completions")
    assert report["score"]["exact_match"] >= 0.75
    preset = run("evaluate", tmp_path / "preset.json", *address, "--preset", "dream-gsm8k")
    assert preset["d2f"]["block_size"] == 32 and preset["d2f"]["max_blocks"] == 2
    assert preset["score"]["exact_match"] >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["throughput", "latency", "serve"])
def test_vllms_benchmarks_know_the_names(kind, tmp_path, request):
    """Without a network."""
    engine = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "67108864"]
    random = ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "16"]
    options = {
        "throughput": [*engine, *random, "--num-prompts", "4"],
        "latency": [*engine, "--input-len", "16", "--output-len", "16", "--batch-size", "1"]
        + ["--num-iters-warmup", "1", "--num-iters", "1"],
        "serve": ["--dataset-name", "custom", "--dataset-path", str(tmp_path / "a.jsonl")]
        + ["--custom-output-len", "64", "--skip-chat-template", "--num-prompts", "4"],
    }[kind]
    if kind == "serve":
        (tmp_path / "a.jsonl").write_text(f"{json.dumps({'prompt': QUESTION})}\n" * 4)
        options += ["--base-url", request.getfixturevalue("server").url]
    program = str(Path(sys.executable).with_name("vllm"))
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [program, "bench", kind, "--model", "d2f-tiny", *options],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
            timeout=600,
        )
    said = (tmp_path / "log").read_text()
    # `bench latency` loads the model and then draws token ids up to 10,000; this model has fewer.
    served = "is out of vocabulary" in said if kind == "latency" else done.returncode == 0
    assert served, said[-3000:]
