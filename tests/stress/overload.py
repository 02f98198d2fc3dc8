# SPDX-License-Identifier: Apache-2.0
"""Overload: ten times more requests than fit, with few pages.

In this process: requests of equal lengths all at once, as many as fit and up to ten times more.
First forwards must come in the order of arrival; where all ask the same, first tokens too (else one
may take more forwards to its first token than another). What a token costs is counted in positions
that go through the model, which repeats exactly, and in CPU time, which does not.

Over HTTP: a server with few pages and a bounded queue (`--max-num-queued-reqs`) under ten times as
many clients as fit. Each request is answered right, or refused with status 503 and asked again.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from stress.engine_state import PAGE, EngineState, engine, watch
from stress.server import read_metrics, settle
from stress.traffic import (
    ANSWER_SECONDS,
    ENGINE_WINDOW,
    SERVER_OPTIONS,
    Ask,
    Client,
    Reference,
    endless,
    engine_answer,
)

from vllm_d2f.d2f import D2FParams

PROMPT, ANSWER = 40, 96
PARAMS = D2FParams(16, 4, 0.1, 0.95, 0.9)
FIT = 8
"""Equal requests whose pages fit at once, windows included."""
PAGES = FIT * -(-(PROMPT + ANSWER) // PAGE)
TIMES_FIT = (0.125, 0.5, 1, 2, 5, 10)
QUEUED = 4 * FIT
CLIENTS = (1, FIT, QUEUED, 10 * FIT)

KINDS = ("greedy", "long prompt", "thresholds", "random tokens", "endless", "drawn")
OPTIONS = (
    *SERVER_OPTIONS,
    *("--kv-cache-memory-bytes", str(1 << 27), "--block-size", str(PAGE)),
    *("--num-gpu-blocks-override", str(PAGES + 1), "--max-num-seqs", "64"),
    *("--max-num-queued-reqs", str(QUEUED)),
)
SHARE_LEFT = 0.5
"""Of the best throughput per CPU second at ten times more than fits, and of the positions that a
token costs: 0.71 and 0.78 were measured."""


def equal_asks(count: int, seed: int) -> list[Ask]:
    """Make requests of one shape: as many tokens in each prompt, but other ones."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, 448) for _ in range(PROMPT)] for _ in range(count)]
    return [endless(prompt, PARAMS, ANSWER) for prompt in prompts]


def burst(llm: Any, asks: Sequence[Ask]) -> dict[str, Any]:
    """Send all requests at once. Return the answers and their cost."""
    state = EngineState(llm)
    identical = len(asks) > 1 and all(ask == asks[0] for ask in asks)
    positions = 0
    first_forward: dict[int, int] = {}

    def count(output: Any) -> None:
        nonlocal positions
        positions += output.total_num_scheduled_tokens
        for request_id in output.scheduled_spec_decode_tokens:
            index = int(request_id.split("-")[0])
            first_forward.setdefault(index, state.scheduler.current_step)

    watch(state.scheduler, "schedule", count)
    started, cpu = time.perf_counter(), time.process_time()
    preempted = state.scheduler.num_preempted
    for index, ask in enumerate(asks):
        state.add(str(index), ask)
    first_token: dict[int, int] = {}
    got: dict[int, Any] = {}
    step = 0
    while state.engine.has_unfinished_requests():
        step += 1
        for output in state.engine.step():
            index = int(output.request_id)
            if output.outputs[0].token_ids:
                first_token.setdefault(index, step)
            if output.finished:
                got[index] = engine_answer(output)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    del state.scheduler.schedule
    state.drain()
    first = first_token if identical else first_forward
    differ = [ask.known[0].tie for i, ask in enumerate(asks) if not got[i].equals(ask.known[0])]
    tokens = sum(len(answer.tokens) for answer in got.values())
    return {
        "requests": len(asks),
        "times_fit": len(asks) / FIT,
        "identical": identical,
        "wrong": differ.count(False),
        "ties": differ.count(True),
        "out_of_order": sum(first[i] > first[i + 1] for i in range(len(asks) - 1)),
        "preemptions": state.scheduler.num_preempted - preempted,
        "positions_per_token": round(positions / tokens, 2),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "leaks": state.leaks(),
    }


def in_process(seed: int = 0) -> dict[str, Any]:
    """Measure a burst of each size on one engine."""
    sizes = [max(1, round(times * FIT)) for times in TIMES_FIT]
    with engine(max_num_seqs=64, num_gpu_blocks_override=PAGES + 1) as llm:
        reference = Reference(llm.llm_engine.vllm_config, window=ENGINE_WINDOW)
        asks = reference.answers(equal_asks(max(sizes), seed))
        burst(llm, asks[:FIT])  # compiled and warm
        levels = [burst(llm, asks[:size]) for size in sizes]
        levels.append(burst(llm, asks[:1] * max(sizes)))
    return {
        "fit": FIT,
        "pages": PAGES,
        "page_tokens": PAGE,
        "in_process": levels,
        "cpu_throughput_left": share_left(levels, "tokens_per_cpu_second"),
    }


async def over_http(url: str, asks: Sequence[Ask], clients: int, requests: int) -> dict[str, Any]:
    """Send requests from clients that ask again when they are refused."""
    rng = random.Random(clients)
    queue = rng.choices(asks, k=requests)
    slowest = 0.0
    before = await asyncio.to_thread(read_metrics, url)
    async with Client(url, clients) as client:

        async def one_client(own: random.Random) -> None:
            nonlocal slowest
            while queue:
                ask = queue.pop()
                began = time.monotonic()
                while not await client.ask(ask, stream=own.random() < 0.5, may_refuse=503):
                    await asyncio.sleep(own.uniform(0.05, 0.3))
                slowest = max(slowest, time.monotonic() - began)

        started = time.monotonic()
        workers = [one_client(random.Random(rng.random())) for _ in range(clients)]
        await asyncio.wait_for(asyncio.gather(*workers), ANSWER_SECONDS * requests)
        seconds = time.monotonic() - started
        left = await settle(url, 60)
    after = await asyncio.to_thread(read_metrics, url)
    return {
        "clients": clients,
        "traffic": client.tally.as_dict(),
        "slowest_answer_s": round(slowest, 2),
        "within_deadline": slowest <= ANSWER_SECONDS,
        "tokens_per_second": round(client.tally.tokens / seconds, 1),
        "preemptions": after["preemptions"] - before["preemptions"],
        "left": left,
    }


def share_left(levels: Sequence[dict[str, Any]], figure: str) -> float:
    """Return the throughput at the highest load as a share of the best."""
    return round(levels[-1][figure] / max(level[figure] for level in levels), 2)


def failures(report: dict[str, Any]) -> list[str]:
    """Describe what went wrong under overload."""
    levels, http = report["in_process"], report["http"]
    over_http = http["levels"]
    found = {
        "wrong answers": any(level["wrong"] for level in levels),
        "out of order": any(level["out_of_order"] for level in levels),
        "leaks": any(level["leaks"] for level in levels),
        "no request was preempted": not levels[-1]["preemptions"],
        "too little throughput is left": report["cpu_throughput_left"] < SHARE_LEFT,
        "too many positions per token": levels[0]["positions_per_token"]
        < SHARE_LEFT * levels[-1]["positions_per_token"],
        "wrong answers over HTTP": any(level["traffic"]["wrong"] for level in over_http),
        "an answer took too long": not all(level["within_deadline"] for level in over_http),
        "left over after HTTP": any(level["left"] for level in over_http),
        "no request was refused": "503" not in over_http[-1]["traffic"]["refused_as_they_must_be"],
        "errors in the log": http["log_errors"],
        "the server ended": not http["alive"],
    }
    return [what for what, happened in found.items() if happened]
