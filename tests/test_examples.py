# SPDX-License-Identifier: Apache-2.0
"""The files in `examples/` run as their README says, against the real thing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(ROOT / "tests" / "http"))
from http_server import free_port, stop, wait_until_ready  # noqa: E402

BIN = Path(sys.executable).parent
ANSWER = "73+24=97-17=80"


def run(*command, **environment):
    """Run a command from the repository's root, and fail with its last words."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        # `vllm`, `lm_eval` and `python` are those of this environment.
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """`vllm serve --config examples/serve.yaml`, on a port that is free."""
    port = free_port()
    with open(tmp_path_factory.mktemp("serve") / "serve.log", "w+") as log:
        process = subprocess.Popen(
            [BIN / "vllm", "serve", "--config", EXAMPLES / "serve.yaml", "--port", str(port)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)
            # A server that had to be killed while it started leaves its engine behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_server_is_the_configured_one(url):
    config = yaml.safe_load((EXAMPLES / "serve.yaml").read_text())
    model = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert model["id"] == config["model"]
    # A window as wide as the file's: blocks that do not fit are refused with the served width.
    body = {"model": model["id"], "prompt": "1", "vllm_xargs": {"d2f_block_size": 4096}}
    refused = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert refused.status_code == 400 and "[1, 64]" in refused.text


def test_the_client(url):
    lines = run(sys.executable, "examples/client.py", "--url", f"{url}/v1").stdout.splitlines()
    assert lines[0].startswith(f"tau_conf 0.99: {ANSWER} (")
    assert lines[1].startswith("tau_conf 0.5: ")
    assert lines[2].startswith("streamed: [")
    assert "".join(lines[2].removeprefix("streamed: ").strip("[]").split("] [")) == ANSWER


def test_lm_eval(url, tmp_path):
    arguments = ("--limit", "8", "--output_path", tmp_path)
    run("bash", "examples/lm_eval.sh", *arguments, URL=url)
    (file,) = tmp_path.rglob("results_*.json")
    report = json.loads(file.read_text())
    assert report["n-samples"]["d2f_arithmetic"]["effective"] == 8
    assert report["results"]["d2f_arithmetic"]["exact_match,none"] >= 0.75


def test_the_batch_is_for_the_model_that_the_readme_names():
    lines = [json.loads(line) for line in (EXAMPLES / "batch.jsonl").read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines) >= 2
    assert {line["body"]["model"] for line in lines} == {"d2f-tiny"}
    assert any("vllm_xargs" in line["body"] for line in lines)


@pytest.mark.slow
def test_run_batch(tmp_path):
    """The command of examples/README.md, into another folder."""
    text = (EXAMPLES / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("vllm run-batch")]
    words = line.split()
    words[words.index("answers.jsonl")] = str(tmp_path / "answers.jsonl")
    run(*words)
    answers = [json.loads(a) for a in (tmp_path / "answers.jsonl").read_text().splitlines()]
    asked = [json.loads(a) for a in (EXAMPLES / "batch.jsonl").read_text().splitlines()]
    assert {a["custom_id"] for a in answers} == {a["custom_id"] for a in asked}
    for answer in answers:
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        choice = answer["response"]["body"]["choices"][0]
        assert choice["message"]["content"] == ANSWER


@pytest.mark.slow
def test_offline(tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    asked = ["Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?"] * 2
    prompts.write_text("\n".join(asked) + "\n")
    run(sys.executable, "examples/offline.py", "--prompts", prompts, "--out", out)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert answers == [{"prompt": prompt, "answer": ANSWER} for prompt in asked]
