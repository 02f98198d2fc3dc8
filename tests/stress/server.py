# SPDX-License-Identifier: Apache-2.0
"""What a running server holds: memory of its processes, pages, and errors in its log."""

import asyncio
import re
import urllib.request

import numpy as np
import psutil

GAUGES = {
    "vllm:kv_cache_usage_perc": "pages_in_use",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:d2f_open_blocks": "open_blocks",
}
PREEMPTIONS = "vllm:num_preemptions_total"
REFUSALS = ("VLLMValidationError", "QueueOverflowError")


def memory(pid: int) -> dict[str, float]:
    """Return the resident MiB of a process and all its descendants, by name."""
    found: dict[str, float] = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            name = "API server" if process.pid == pid else _name(process)
            found[name] = found.get(name, 0.0) + process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    return found


def _name(process: psutil.Process) -> str:
    """Return a process's name: vLLM's title, or for Python's helpers their command."""
    title = " ".join(process.cmdline())
    for word, name in (("EngineCore", "engine"), ("resource_tracker", "resource tracker")):
        if word in title or word in process.name():
            return name
    return process.name()


def child(pid: int, name: str) -> int:
    """Return the process id of a server's engine or worker, by vLLM's title for it."""
    children = psutil.Process(pid).children(recursive=True)
    (found,) = [c.pid for c in children if name in " ".join(c.cmdline())]
    return found


def read_metrics(url: str) -> dict[str, float]:
    """Return gauges by our names, summed over labels, and the preemptions so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        return parse_metrics(response.read().decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Read the gauges and preemptions in the text of /metrics."""
    names = GAUGES | {PREEMPTIONS: "preemptions"}
    found = dict.fromkeys(names.values(), 0.0)
    for line in text.splitlines():
        name = names.get(re.split(r"[{ ]", line, maxsplit=1)[0])
        if name is not None:
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


async def settle(url: str, seconds: float) -> dict[str, float]:
    """Return what is still in use without a request, after at most `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        metrics = await asyncio.to_thread(read_metrics, url)
        left = {name: metrics[name] for name in GAUGES.values() if metrics[name]}
        if not left or asyncio.get_running_loop().time() > deadline:
            return left
        await asyncio.sleep(0.5)


def log_errors(log: str) -> list[str]:
    """Lines of a server's log that report a failure.

    vLLM logs a traceback for a request that streams and is refused. The traffic asked for those:
    they end in one of `REFUSALS`.
    """
    pattern = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback|EngineDeadError|Segmentation fault")
    groups: list[list[str]] = [[]]
    for line in log.splitlines():
        if not pattern.search(line) or "Error in completion stream generator" in line:
            groups.append([])
        if pattern.search(line):
            groups[-1].append(line[:300])
    return [
        line
        for group in groups
        if not any(refusal in line for line in group for refusal in REFUSALS)
        for line in group
    ]


def growth(samples: list[tuple[float, float]], warm_up: float) -> dict[str, float]:
    """How one process's memory grew after a warm-up.

    Args:
        samples: (seconds, MiB) at quiet moments, two at least behind the warm-up.

    Returns:
        MiB at the first and the last of these moments, and the slope of the straight line through
        them in MiB per hour.
    """
    late = [(at, mib) for at, mib in samples if at >= warm_up]
    if len(late) < 2:
        raise ValueError(f"{len(late)} moments after a warm-up of {warm_up:.0f} s; run for longer")
    at, mib = np.array(late).T
    slope = float(np.polyfit(at / 3600, mib, 1)[0])
    return {"first": round(mib[0], 1), "last": round(mib[-1], 1), "slope": round(slope, 1)}
