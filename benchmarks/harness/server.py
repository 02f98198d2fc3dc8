# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process, its counters and its answers, over HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

VLLM = Path(sys.executable).with_name("vllm")
STOP_SECONDS = 30
COUNTERS = {
    # Prometheus name -> ours. vLLM registers the first three for diffusion models only.
    "vllm:diffusion_num_denoising_steps_total": "denoising_forwards",
    "vllm:diffusion_num_canvas_positions_total": "window_positions",
    "vllm:diffusion_num_committed_tokens_total": "committed_tokens",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:num_preemptions_total": "preemptions",
}
SIMULATED = "vllm:d2f_simulated_tokens_per_forward"


@dataclass(frozen=True, slots=True)
class Launched:
    """A server of ours: its address, its process, and its log so far."""

    url: str
    process: subprocess.Popen
    log: IO[str]

    def read_log(self) -> str:
        self.log.seek(0)
        return self.log.read()


@contextlib.contextmanager
def serve(
    model: str, options: Sequence[str], base_url: str | None, timeout: float
) -> Iterator[str]:
    """Yield the address of a server with this model: a new one, or the one that was named."""
    if base_url:
        yield base_url.rstrip("/")
        return
    with launch(model, options, timeout) as server:
        yield server.url


@contextlib.contextmanager
def launch(model: str, options: Sequence[str], timeout: float) -> Iterator[Launched]:
    """Start a server and wait until it is ready; it ends with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(VLLM), "serve", model, "--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A group of its own: Ctrl-C ends this benchmark, and this benchmark ends the server.
        process = subprocess.Popen(
            command, env=_environment(), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        server = Launched(url, process, log)
        try:
            # A benchmark that is told to end (by `timeout`, say) ends its server too.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            if not _ready(process, url, timeout):
                raise subprocess.SubprocessError(
                    f"vllm serve {model} did not start. Its log ends:\n{server.read_log()[-3000:]}"
                )
            yield server
        finally:
            _stop(process)


def _environment() -> dict[str, str]:
    """Give a server's engine a process of its own, whatever this one has chosen for its engines."""
    return {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _ready(process: subprocess.Popen, url: str, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
        time.sleep(0.5)
    return False


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_command(command: Sequence[str], timeout: float) -> str:
    """Run to the end and return the output; a failure shows how it ended."""
    done = subprocess.run(
        command, env=_environment(), timeout=timeout, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        shown = " ".join(["vllm", *command[1:4]])
        raise subprocess.SubprocessError(f"{shown} failed. It ends:\n{done.stdout[-3000:]}")
    return done.stdout


def complete(
    url: str, model: str, prompts: Sequence[str], max_tokens: int
) -> list[tuple[str, bool]]:
    """Send all prompts to /v1/completions in one call. Return each text, and whether it ended by
    itself."""
    body = {"model": model, "prompt": list(prompts), "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            choices = json.load(response)["choices"]
    except urllib.error.HTTPError as error:
        raise subprocess.SubprocessError(f"{url} says: {error.read().decode()[:500]}") from error
    except OSError as error:
        raise subprocess.SubprocessError(f"--base-url: no answer from {url}: {error}") from error
    choices.sort(key=lambda choice: choice["index"])
    return [(choice["text"], choice["finish_reason"] == "stop") for choice in choices]


def metrics(url: str) -> str:
    """Return the text of /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        return response.read().decode()


def parse_counters(text: str) -> dict[str, float]:
    """Return the counters of interest, summed over engines; absent ones are left out."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if name := COUNTERS.get(line.split("{")[0].split(" ")[0]):
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def parse_simulated(text: str) -> float | None:
    """Return the tokens per forward that the server makes up, None where its model decides."""
    lines = [line for line in text.splitlines() if line.startswith(SIMULATED)]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else None


def d2f_figures(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Return the differences between two readings, without D2F's figures for other models."""
    delta = {name: after[name] - before.get(name, 0.0) for name in after}
    figures: dict[str, Any] = {"counters": {name: int(value) for name, value in delta.items()}}
    if forwards := delta.get("denoising_forwards"):
        tokens, positions = delta["committed_tokens"], delta["window_positions"]
        figures["tokens_per_forward"] = round(tokens / forwards, 3)
        figures["positions_per_token"] = round(positions / max(tokens, 1), 2)
    return figures
