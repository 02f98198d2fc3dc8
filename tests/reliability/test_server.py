# SPDX-License-Identifier: Apache-2.0
"""One real server with a key: what it lets in, what it logs, odd requests, and its engine's death.

The tests run in this order: the last one kills the engine.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "http")]

from http_server import MODEL, free_port, stop, wait_until_ready  # noqa: E402

from benchmarks.reliability.faults import SLOW  # noqa: E402
from benchmarks.reliability.fuzz import (  # noqa: E402
    COMPLETIONS,
    EITHER,
    PROMPT,
    Ask,
    Outcome,
    Target,
    body_of,
    drawn_xargs,
    extremes,
    token_ids,
)

KEY = "a-key-for-this-test"
MARKER = "Zanzibarquux"
"""Stands in prompts and in no log."""


@dataclass(frozen=True)
class Running:
    url: str
    process: subprocess.Popen
    log: Path

    def post(self, path: str = COMPLETIONS, key: str | None = KEY, **options) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "temperature": 0} | options
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=300)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", MODEL, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--api-key", KEY]
    command += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 27)]
    with log.open("w+") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(os.environ),
            start_new_session=True,
        )
        try:
            wait_until_ready(process, url, file)
            yield Running(url, process, log)
        finally:
            stop(process)


@pytest.fixture(scope="module")
def target(running) -> Target:
    return Target(running.url, MODEL, {"Authorization": f"Bearer {KEY}"})


def test_the_key_covers_every_question(running):
    """D2F adds options and metrics, and no route."""
    for key in (None, "another", KEY[:-1]):
        for path in (COMPLETIONS, "/v1/chat/completions"):
            assert running.post(path, key, vllm_xargs={"d2f_trace": 1}).status_code == 401
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
    assert running.post(vllm_xargs={"d2f_trace": 1}).json()["kv_transfer_params"]["d2f"]
    paths = httpx.get(f"{running.url}/openapi.json").json()["paths"]
    assert not [path for path in paths if "d2f" in path.lower()]
    # vLLM leaves /metrics open; what is there is counts and the served model's name.
    shown = httpx.get(f"{running.url}/metrics").text
    assert "vllm:d2f_forwards_total" in shown


def test_the_edges_of_the_api(running, target):
    """A tenth of what `benchmarks.reliability.fuzz` sends, and all that concerns D2F."""
    outcome = Outcome()
    asks = list(extremes(MODEL, *token_ids(target)))
    slow = ("million", "10,000 bad", "endless", "max_tokens at the limit")
    chosen = [a for i, a in enumerate(asks) if i % 10 == 0 or b'"d2f_' in a.body]
    for ask in [a for a in chosen if not any(word in a.name for word in slow)]:
        target.send(ask, outcome)
    for xargs in drawn_xargs(60, seed=7):
        body = body_of(MODEL, vllm_xargs=xargs)
        target.send(Ask("drawn", COMPLETIONS, body, EITHER), outcome)
    assert outcome.sent > 100 and outcome.wrong == []
    assert outcome.good_changed == 0 and outcome.good_beside == outcome.sent
    assert {"200", "400"} <= outcome.statuses.keys()


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
    assert MARKER not in running.log.read_text()
    assert KEY not in running.log.read_text()


def test_a_killed_engine_is_an_error_for_everybody_and_the_end(running):
    psutil = pytest.importorskip("psutil")
    met: list[str] = []
    answered = [0] * 6

    def client(which: int) -> None:
        """Ask again and again, so that every client waits for an answer at any moment."""
        try:
            while True:
                stream = which % 2 == 0
                response = running.post(prompt=f"{MARKER} is", stream=stream, **SLOW)
                if response.status_code != 200 or '"error"' in response.text:
                    break
                if stream and "[DONE]" not in response.text:
                    break
                answered[which] += 1
        except httpx.HTTPError:
            pass
        met.append("error")

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 240
    while not all(answered) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(answered)
    children = psutil.Process(running.process.pid).children(recursive=True)
    (engine,) = [c for c in children if "EngineCore" in " ".join(c.cmdline())]
    os.kill(engine.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(240)
    assert met == ["error"] * 6
    running.process.wait(240)
    log = running.log.read_text()
    assert "EngineDeadError" in log or "died" in log
    assert MARKER not in log


def test_a_killed_engine_shows_in_the_exit_status(running):
    """After the test above: a supervisor that starts again what failed does so."""
    assert running.process.poll() == 1
    assert "The engine died, see the first error above" in running.log.read_text()
