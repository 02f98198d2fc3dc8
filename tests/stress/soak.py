# SPDX-License-Identifier: Apache-2.0
"""Soak: `vllm serve d2f-tiny` under mixed traffic, and what it holds afterwards.

Clients send requests of many kinds, streamed and not, and close a part of their connections. At
quiet moments, when all answers have come, the memory of every process is read. After a warm-up it
may grow by `GROWTH` and `SLACK_MIB`.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from stress.server import growth, log_errors, memory, read_metrics, settle
from stress.traffic import SERVER_OPTIONS, Ask, Client

CLIENTS, ABORTS, QUIET_MOMENTS = 24, 0.15, 20
GROWTH, SLACK_MIB = 0.03, 16.0
"""Memory that a process may keep for reasons of its own, such as an allocator's pools."""
OPTIONS = (
    *SERVER_OPTIONS,
    # Few pages: all of them are touched in the warm-up, and do not look like growth later.
    *("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 25)),
)


async def soak(server: Any, asks: Sequence[Ask], seconds: float) -> dict[str, Any]:
    """Run traffic on a server, in stretches with a pause after each."""
    started = time.monotonic()
    warm_up = max(seconds / 4, min(seconds / 2, 180))
    quiet: list[dict[str, Any]] = []
    before = read_metrics(server.url)
    async with Client(server.url, CLIENTS) as client:

        async def one_client(rng: random.Random, until: float) -> None:
            while time.monotonic() < until:
                ask = rng.choice(asks)
                if ask.known and rng.random() < ABORTS:
                    await client.abort(ask, rng)
                else:
                    await client.ask(ask, stream=rng.random() < 0.5)

        while time.monotonic() - started < seconds:
            until = min(time.monotonic() + seconds / QUIET_MOMENTS, started + seconds)
            seeds = range(len(quiet) * CLIENTS, (len(quiet) + 1) * CLIENTS)
            await asyncio.gather(*(one_client(random.Random(seed), until) for seed in seeds))
            left = await settle(server.url, 60)
            at = round(time.monotonic() - started, 1)
            quiet.append({"at": at, "left": left, "mib": memory(server.process.pid)})
    grown = {}
    for name in sorted(quiet[0]["mib"]):
        samples = [(moment["at"], moment["mib"].get(name, 0.0)) for moment in quiet]
        grown[name] = growth(samples, warm_up)
        grown[name]["allowed"] = round(grown[name]["first"] * (1 + GROWTH) + SLACK_MIB, 1)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "distinct_requests": len(asks),
        "clients": CLIENTS,
        "traffic": client.tally.as_dict(),
        "preemptions": read_metrics(server.url)["preemptions"] - before["preemptions"],
        "quiet_moments": len(quiet),
        "left_at_quiet_moments": [moment["left"] for moment in quiet if moment["left"]],
        "warm_up_seconds": warm_up,
        "memory_mib": grown,
        "memory_samples": [[m["at"], {n: round(v, 1) for n, v in m["mib"].items()}] for m in quiet],
        "log_errors": log_errors(server.read_log())[:20],
        "alive": server.process.poll() is None,
    }


def failures(report: dict[str, Any]) -> list[str]:
    """Describe what went wrong in a soak."""
    traffic = report["traffic"]
    found = {
        "no answer equals the reference": not traffic["equal_to_the_reference"],
        "wrong answers": traffic["wrong"],
        "pages, requests or blocks are left": report["left_at_quiet_moments"],
        "errors in the log": report["log_errors"],
        "the server ended": not report["alive"],
    }
    found |= {f"{name} grew": m["last"] > m["allowed"] for name, m in report["memory_mib"].items()}
    return [what for what, happened in found.items() if happened]
