# SPDX-License-Identifier: Apache-2.0
"""One real server with a key: what it lets in, what it logs, odd requests, and its engine's death.

The tests run in this order: the last one kills the engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from stress import faults, fuzz
from stress.faults import COMPLETIONS, PROMPT
from stress.traffic import MODEL

from benchmarks.harness.server import Launched, launch

KEY = "a-key-for-this-test"
MARKER = "Zanzibarquux"
"""Stands in prompts and in no log."""
START_SECONDS = 900
"""A machine whose cores are all taken needs minutes where an idle one needs half of one."""


@dataclass(frozen=True)
class Running:
    server: Launched

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.server.url}{path}", timeout=300)

    def post(self, path: str = COMPLETIONS, key: str | None = KEY, **options) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "temperature": 0} | options
        return httpx.post(f"{self.server.url}{path}", json=body, headers=headers, timeout=300)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with launch(MODEL, [*fuzz.OPTIONS, "--api-key", KEY], START_SECONDS) as server:
        yield Running(server)


@pytest.fixture(scope="module")
def target(running) -> fuzz.Target:
    return fuzz.Target(running.server.url, MODEL, {"Authorization": f"Bearer {KEY}"})


def test_the_key_covers_every_question(running):
    """D2F adds options and metrics, and no route."""
    for key in (None, "another", KEY[:-1]):
        for path in (COMPLETIONS, "/v1/chat/completions"):
            assert running.post(path, key, vllm_xargs={"d2f_trace": 1}).status_code == 401
        assert running.get("/v1/models").status_code == 401
    assert running.post(vllm_xargs={"d2f_trace": 1}).json()["kv_transfer_params"]["d2f"]
    paths = running.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if "d2f" in path.lower()]
    # vLLM leaves /metrics open; what is there is counts and the served model's name.
    shown = running.get("/metrics").text
    assert "vllm:d2f_forwards_total" in shown


def test_the_edges_of_the_api(target):
    """A tenth of what the stress test sends, and all that concerns D2F."""
    slow = ("million", "10,000 bad", "endless", "max_tokens at the limit")
    asks = list(fuzz.extremes(target))
    chosen = [ask for i, ask in enumerate(asks) if i % 10 == 0 or "d2f_" in str(ask[2])]
    for ask in chosen:
        if not any(word in ask[0] for word in slow):
            target.send(*ask)
    fuzz.send_d2f_options(target, 60, seed=7)
    assert target.sent > 100 and target.wrong == []
    assert target.changed == 0
    assert {"200", "400"} <= target.statuses.keys()


def test_nothing_of_a_prompt_is_logged(running):
    """Answered, refused at admission, refused by the tokenizer's length, streamed, as chat."""
    text = f"{MARKER} has 73 pens."
    assert running.post(prompt=text).status_code == 200
    assert running.post(prompt=text, stream=True).status_code == 200
    assert running.post(prompt=text, vllm_xargs={"d2f_tau_conf": 2}).status_code == 400
    assert running.post(prompt=text * 500).status_code == 400
    assert running.post(prompt=text, stop=[MARKER]).status_code == 200
    assert running.post(prompt=text, structured_outputs={"regex": f"({MARKER}"}).status_code == 400
    assert running.post(prompt=[MARKER, {}]).status_code == 400
    chat = [{"role": "user", "content": text}]
    assert running.post("/v1/chat/completions", messages=chat).status_code == 200
    assert running.post("/v1/chat/completions", messages=[chat]).status_code == 400
    assert MARKER not in running.server.read_log()
    assert KEY not in running.server.read_log()


def test_a_killed_engine_is_an_error_for_everybody_and_the_end(running):
    """Status 1 at the end: a supervisor that starts again what failed does so."""
    server, headers = running.server, {"Authorization": f"Bearer {KEY}"}
    report = faults.kill_under_load(
        server.url, server.process, "EngineCore", 6, f"{MARKER} is", headers
    )
    log = server.read_log()
    assert faults.failures(report, log) == []
    assert "EngineDeadError" in log or "died" in log
    assert MARKER not in log
