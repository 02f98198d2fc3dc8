# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` process, shared by the tests of this folder."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from http_server import KEEP_ALIVE, MODEL, Server, free_port, stop, wait_until_ready


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """`vllm serve d2f-tiny` on a free port. The log's path is printed when a test failed."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    vllm = Path(sys.executable).with_name("vllm")
    command = [
        *(str(vllm), "serve", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *(
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-num-seqs",
            "16",
            "--kv-cache-memory-bytes",
            str(1 << 27),
            # Else a grammar allows whitespace without end, and this model likes it.
            "--structured-outputs-config",
            '{"backend": "xgrammar", "disable_any_whitespace": true}',
        ),
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
            env=os.environ | KEEP_ALIVE,
            start_new_session=True,
        )
        try:
            wait_until_ready(process, url, log)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
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
