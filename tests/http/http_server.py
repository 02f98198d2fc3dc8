# SPDX-License-Identifier: Apache-2.0
"""Starting and ending a real `vllm serve` process."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import IO

import httpx
import openai
import pytest

MODEL = "d2f-tiny"
START_SECONDS = 900
"""A machine whose cores are all taken needs minutes where an idle one needs half of one."""
STOP_SECONDS = 60
KEEP_ALIVE = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
"""vLLM closes a connection that was idle for 5 seconds, which is when httpx gives it up, too: a
client that retries nothing then sends its next request into a closed connection."""


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
    """Ask the server, started in a session of its own, to end, and make it end."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # A server that is ended while it starts leaves its engine behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
