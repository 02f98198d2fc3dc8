# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` process, shared by the tests of this folder."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import openai
import pytest

MODEL = "d2f-tiny"
START_SECONDS = 300
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """Where the server listens, and its official client."""

    url: str
    client: openai.OpenAI


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, url: str, log: IO[str]) -> None:
    """Return when the server answers its health check; fail with its log when it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    log.seek(0)
    reason = "is not ready in time" if process.poll() is None else f"ended: {process.returncode}"
    pytest.fail(f"vllm serve {reason}. Its log ends:\n{log.read()[-6000:]}", pytrace=False)


def stop(process: subprocess.Popen) -> None:
    """Ask the server to end, and make it end."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """`vllm serve d2f-tiny` on a free port. The log's path is printed when a test failed."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    vllm = Path(sys.executable).with_name("vllm")
    command = [
        *(str(vllm), "serve", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 27)),
    ]
    failed_before = request.session.testsfailed
    with tempfile.NamedTemporaryFile(
        "w+", prefix="vllm-serve-", suffix=".log", delete=False
    ) as log:
        # stdin closed and a group of its own: Ctrl-C ends pytest, and pytest ends the server.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ),
            start_new_session=True,
        )
        try:
            wait_until_ready(process, url, log)
            client = openai.OpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120
            )
            yield Server(url, client)
            assert process.poll() is None, f"the server ended by itself, see {log.name}"
        finally:
            stop(process)
            if request.session.testsfailed > failed_before:
                print(f"\nlog of vllm serve: {log.name}")
            else:
                os.unlink(log.name)


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client
