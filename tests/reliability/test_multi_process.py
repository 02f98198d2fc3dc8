# SPDX-License-Identifier: Apache-2.0
"""Two ranks of tensor or data parallelism on CPU processes answer like one process.

Slow: five to seven processes start on two cores. vLLM binds a worker to cores, so the ranks of
tensor parallelism are given one each.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from benchmarks.harness.server import launch

pytestmark = pytest.mark.slow

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
OPTIONS += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 26)]
KINDS = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 0.9, "seed": 3, "top_k": 5},
    {"temperature": 1.1, "seed": 4, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0, "structured_outputs": {"regex": "[0-9]{1,3}"}},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"temperature": 0, "vllm_xargs": {"d2f_block_size": 8, "d2f_tau_conf": 0.5}},
)


def bodies() -> list[dict]:
    text = "Leo has {} pens, finds {} more, throws 17 away. How many pens does Leo have?"
    return [
        {
            "model": "d2f-tiny",
            "prompt": text.format(a, 99 - a),
            "max_tokens": 48,
            "return_token_ids": True,
            **kind,
        }
        for a in range(20, 68, 4)
        for kind in KINDS
    ]


def answers(monkeypatch, bind: str, *options: str) -> tuple[list, dict[str, float]]:
    """Tokens and log-probabilities of all requests, many at once, and the server's counters."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)

    def ask(body: dict) -> tuple[list[int], list[float]]:
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice["token_ids"], (choice["logprobs"] or {}).get("token_logprobs", [])

    with launch("d2f-tiny", [*OPTIONS, *options], 600) as server, ThreadPoolExecutor(12) as pool:
        got = list(pool.map(ask, bodies()))
        engines = httpx.get(f"{server.url}/metrics").text
        log = server.read_log()
    assert "ERROR" not in log and "Traceback" not in log
    served = {
        line.split('engine="')[1][0]: float(line.rpartition(" ")[2])
        for line in engines.splitlines()
        if line.startswith("vllm:d2f_forwards_total")
    }
    return got, served


@pytest.fixture(scope="module")
def single():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return answers(monkeypatch, "nobind")[0]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize(
    ("bind", "option", "engines"),
    [("0|1", "--tensor-parallel-size", 1), ("nobind", "--data-parallel-size", 2)],
)
def test_two_ranks_answer_like_one_process(monkeypatch, single, bind, option, engines):
    got, served = answers(monkeypatch, bind, option, "2")
    assert len(served) == engines and min(served.values()) > 0
    for body, (tokens, logprobs), (other, others) in zip(bodies(), single, got, strict=True):
        assert other == tokens, body
        # Two halves of a product are added in another order.
        assert others == pytest.approx(logprobs, abs=1e-4), body
