# SPDX-License-Identifier: Apache-2.0
"""Soak: `vllm serve d2f-tiny` under mixed traffic, and what it holds afterwards.

    python -m benchmarks.reliability.soak --minutes 60 \
        --json benchmarks/results/reliability_soak.json

Clients send requests of many kinds (`traffic`), streamed and not, and close a part of their
connections. Each answer is compared with the reference. At quiet moments, when all answers have
come, no page, request or open block may be left, and the memory of every process is read: after a
warm-up it may not grow by more than `--growth` per cent and 16 MiB, and with many moments not in
a straight line either. The log may hold no error.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.record import environment
from benchmarks.harness.server import Launched, launch
from benchmarks.reliability.server import growth, log_errors, memory, read_metrics, settle
from benchmarks.reliability.traffic import (
    ANSWER_SECONDS,
    MODEL,
    SERVER_OPTIONS,
    WINDOW,
    Client,
    HttpAsk,
    make_http_asks,
    server_config,
)
from benchmarks.reliability.truth import load_truth

SETTLE_SECONDS = 60
SLACK_MIB = 16.0
"""Memory that a process may keep for reasons of its own, such as an allocator's pools."""

OPTIONS = (
    *SERVER_OPTIONS,
    # Few pages: all of them are touched in the warm-up, and do not look like growth later.
    *("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 25)),
)


async def soak(
    server: Launched,
    asks: Sequence[HttpAsk],
    *,
    seconds: float,
    clients: int,
    aborts: float,
    quiet_every: float,
    warm_up: float,
    growth_percent: float,
    seed: int,
) -> dict[str, Any]:
    """Traffic on a server that is ready, in stretches with a quiet moment after each."""
    from tqdm import tqdm

    started = time.monotonic()
    quiet: list[dict[str, Any]] = []
    rng = random.Random(seed)
    before = read_metrics(server.url)
    async with Client(server.url, clients) as client:
        with tqdm(total=round(seconds), desc="seconds", disable=None) as bar:
            while time.monotonic() - started < seconds:
                until = min(time.monotonic() + quiet_every, started + seconds)
                await asyncio.gather(
                    *(_client(client, asks, random.Random(rng.random()), aborts, until)
                      for _ in range(clients))
                )  # fmt: skip
                left = await settle(server.url, SETTLE_SECONDS)
                at = time.monotonic() - started
                quiet.append({"at": round(at, 1), "left": left, "mib": memory(server.process.pid)})
                bar.update(round(at) - bar.n)
                bar.set_postfix(sent=client.tally.sent, wrong=len(client.tally.wrong))
        tally = client.tally
    names = sorted(quiet[0]["mib"])
    grown = {}
    for name in names:
        samples = [(moment["at"], moment["mib"].get(name, 0.0)) for moment in quiet]
        grown[name] = asdict(growth(samples, warm_up))
        allowed = grown[name]["first"] * growth_percent / 100 + SLACK_MIB
        grown[name]["allowed"] = round(grown[name]["first"] + allowed, 1)
    after = read_metrics(server.url)
    report = {
        "seconds": round(time.monotonic() - started, 1),
        "distinct_requests": len(asks),
        "clients": clients,
        "traffic": tally.as_dict(),
        "preemptions": after["preemptions"] - before["preemptions"],
        "quiet_moments": len(quiet),
        "left_at_quiet_moments": [moment["left"] for moment in quiet if moment["left"]],
        "warm_up_seconds": warm_up,
        "memory_mib": grown,
        "memory_samples": [[m["at"], {n: round(v, 1) for n, v in m["mib"].items()}] for m in quiet],
        "log_errors": log_errors(server.read_log())[:20],
        "alive": server.process.poll() is None,
    }
    report["passed"] = passed(report)
    return report


def passed(report: dict[str, Any]) -> bool:
    """All the module's docstring promises."""
    within = all(m["last"] <= m["allowed"] for m in report["memory_mib"].values())
    clean = not (report["left_at_quiet_moments"] or report["log_errors"])
    answered = not report["traffic"]["wrong"] and report["traffic"]["equal_to_the_reference"] > 0
    return bool(within and clean and answered and report["alive"])


async def _client(
    client: Client, asks: Sequence[HttpAsk], rng: random.Random, aborts: float, until: float
) -> None:
    """One client after another request until its time is over."""
    while time.monotonic() < until:
        ask = rng.choice(asks)
        if ask.known is not None and rng.random() < aborts:
            await client.abort(ask, rng)
        else:
            await client.ask(ask, stream=rng.random() < 0.5)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=24, help="connections at once")
    parser.add_argument("--asks", type=int, default=400, help="distinct requests")
    parser.add_argument("--kinds", nargs="+", help="of requests (see `traffic`); default: all")
    parser.add_argument("--aborts", type=float, default=0.15, help="share of connections closed")
    parser.add_argument("--growth", type=float, default=3.0, help="memory may grow, per cent")
    parser.add_argument("--quiet-every", type=float, help="seconds; default: 20 quiet moments")
    parser.add_argument("--start-seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm_d2f import register

    register()
    config = server_config()
    asks = make_http_asks(args.asks, args.seed, load_truth(config, window=WINDOW), kinds=args.kinds)
    report = environment(
        args.seed, sys.argv[1:] if argv is None else argv, "benchmarks.reliability.soak"
    )
    report["server"] = f"vllm serve {MODEL} {' '.join(OPTIONS)}"
    seconds = 60 * args.minutes
    with launch(MODEL, OPTIONS, args.start_seconds) as server:
        run = soak(
            server,
            asks,
            seconds=seconds,
            clients=args.clients,
            aborts=args.aborts,
            quiet_every=args.quiet_every or seconds / 20,
            warm_up=seconds / 4,
            growth_percent=args.growth,
            seed=args.seed,
        )
        report |= asyncio.run(asyncio.wait_for(run, seconds + 20 * ANSWER_SECONDS))
    print(json.dumps({k: v for k, v in report.items() if k != "memory_samples"}, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
