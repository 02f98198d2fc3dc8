# SPDX-License-Identifier: Apache-2.0
"""Overload: ten times more requests than fit, with few pages.

    python -m benchmarks.reliability.overload --json benchmarks/results/reliability_overload.json

In this process: requests of equal lengths all at once, as many as fit and up to ten times more.
Each is compared with the reference, and requests must have been preempted. First forwards must come
in the order of arrival; where all ask the same, first tokens too (else one may take more forwards
to its first token than another). What a token costs is counted in positions that go through the
model, which repeats exactly, and in CPU time, which does not.

Over HTTP: a server with few pages and a bounded queue (`--max-num-queued-reqs`) under ten times as
many clients as fit. Each request is answered right or refused with status 503 and asked again;
none may take longer than `--deadline`.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.record import environment
from benchmarks.harness.server import launch
from benchmarks.parity import Case, shut_down, start_engine
from benchmarks.reliability.asks import Ask, answer_of, known_answers
from benchmarks.reliability.inside import Inside
from benchmarks.reliability.server import log_errors, read_metrics, settle
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
from benchmarks.reliability.truth import Known, load_truth
from vllm_d2f.d2f import D2FParams

MAX_LEN = 320
PAGE = 32
PROMPT, ANSWER = 40, 96
PARAMS = D2FParams(16, 4, 0.1, 0.95, 0.9)
PAGES_EACH = -(-(PROMPT + ANSWER) // PAGE)
FIT = 8
"""Equal requests whose pages fit at once, windows included."""

OPTIONS = (
    *SERVER_OPTIONS,
    *("--kv-cache-memory-bytes", str(1 << 27), "--block-size", str(PAGE)),
)


@dataclass(frozen=True)
class Level:
    """A number of requests at once, and what they cost."""

    requests: int
    identical: bool
    seconds: float
    cpu_seconds: float
    tokens: int
    positions: int
    preemptions: int
    wrong: int
    ties: int
    out_of_order: int
    leaks: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "times_fit": self.requests / FIT,
            "identical": self.identical,
            "wrong": self.wrong,
            "ties": self.ties,
            "out_of_order": self.out_of_order,
            "preemptions": self.preemptions,
            "positions_per_token": round(self.positions / self.tokens, 2),
            "tokens_per_cpu_second": round(self.tokens / self.cpu_seconds, 1),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "leaks": self.leaks,
        }


def start(**options: Any) -> Any:
    """An engine whose pages are enough for `FIT` of the requests."""
    return start_engine(
        MODEL,
        window=PARAMS.window,
        max_model_len=MAX_LEN,
        block_size=PAGE,
        max_num_seqs=64,
        num_gpu_blocks_override=FIT * PAGES_EACH + 1,
        **options,
    )


def equal_asks(count: int, seed: int) -> list[Ask]:
    """Requests of one shape: other tokens in each prompt, the same number of them."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(2, 448) for _ in range(PROMPT)) for _ in range(count)]
    return [Ask(Case(prompt, PARAMS, ANSWER), "endless") for prompt in prompts]


def burst(llm: Any, asks: Sequence[Ask], known: Sequence[Known]) -> Level:
    """All at once, in order."""
    engine, inside = llm.llm_engine, Inside(llm)
    identical = len(asks) > 1 and len(set(asks)) == 1
    positions, denoised = _count_positions(inside)
    started, cpu = time.perf_counter(), time.process_time()
    preempted = inside.scheduler.num_preempted
    for index, ask in enumerate(asks):
        prompt: Any = {"prompt_token_ids": list(ask.case.prompt)}
        engine.add_request(str(index), prompt, ask.sampling_params())
    first_token: dict[int, int] = {}
    got: dict[int, Any] = {}
    step = 0
    while engine.has_unfinished_requests():
        step += 1
        for output in engine.step():
            index = int(output.request_id)
            if output.outputs[0].token_ids:
                first_token.setdefault(index, step)
            if output.finished:
                got[index] = answer_of(output)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    vars(inside.scheduler).pop("schedule")
    inside.drain(lambda output: None)
    first = first_token if identical else denoised
    pairs = [(got[i], known[i]) for i in range(len(asks))]
    return Level(
        requests=len(asks),
        identical=identical,
        seconds=seconds,
        cpu_seconds=cpu,
        tokens=sum(len(answer.tokens) for answer, _ in pairs),
        positions=positions[0],
        preemptions=inside.scheduler.num_preempted - preempted,
        wrong=sum(answer != k.answer and not k.tie for answer, k in pairs),
        ties=sum(answer != k.answer and k.tie for answer, k in pairs),
        out_of_order=sum(first[i] > first[i + 1] for i in range(len(asks) - 1)),
        leaks=inside.leaks(),
    )


def _count_positions(inside: Inside) -> tuple[list[int], dict[int, int]]:
    """Positions that go through the model from now on; of each request its first forward."""
    scheduler, total = inside.scheduler, [0]
    first: dict[int, int] = {}
    schedule = scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        total[0] += output.total_num_scheduled_tokens
        for request_id in output.scheduled_spec_decode_tokens:
            first.setdefault(int(request_id.split("-")[0]), scheduler.current_step)
        return output

    scheduler.schedule = watched
    return total, first


def in_process(times: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """A burst of each size on one engine."""
    sizes = [max(1, round(t * FIT)) for t in times]
    asks = equal_asks(max(sizes), seed)
    llm = start()
    try:
        known = known_answers(asks, llm.llm_engine.vllm_config)
        burst(llm, asks[:FIT], known)  # compiled and warm
        levels = []
        for these, those in [
            *((asks[:size], known[:size]) for size in sizes),
            (asks[:1] * max(sizes), known[:1] * max(sizes)),
        ]:
            level = burst(llm, these, those).as_dict()
            print(f"in process: {json.dumps(level)}", flush=True)
            levels.append(level)
        return levels
    finally:
        shut_down(llm)


async def over_http(
    url: str, asks: Sequence[HttpAsk], clients: int, requests: int, deadline: float, seed: int
) -> dict[str, Any]:
    """`requests` requests from `clients` clients that come again when they are refused."""
    rng = random.Random(seed)
    queue = [rng.choice(asks) for _ in range(requests)]
    slowest = [0.0]
    before = await asyncio.to_thread(read_metrics, url)
    async with Client(url, clients) as client:

        async def one_client(own: random.Random) -> None:
            while queue:
                ask = queue.pop()
                began = time.monotonic()
                while await client.ask(ask, stream=own.random() < 0.5, may_refuse=503) == "refused":
                    await asyncio.sleep(own.uniform(0.05, 0.3))
                slowest[0] = max(slowest[0], time.monotonic() - began)

        started = time.monotonic()
        workers = [one_client(random.Random(rng.random())) for _ in range(clients)]
        await asyncio.wait_for(asyncio.gather(*workers), deadline * requests)
        seconds = time.monotonic() - started
        left = await settle(url, 60)
        after = await asyncio.to_thread(read_metrics, url)
        return {
            "clients": clients,
            "traffic": client.tally.as_dict(),
            "slowest_answer_s": round(slowest[0], 2),
            "within_deadline": slowest[0] <= deadline,
            "tokens_per_second": round(client.tally.tokens / seconds, 1),
            "preemptions": after["preemptions"] - before["preemptions"],
            "left": left,
        }


def http_part(args: argparse.Namespace) -> dict[str, Any]:
    """One server, levels of load one after the other."""
    asks = make_http_asks(
        args.asks, args.seed, load_truth(server_config(), window=WINDOW), kinds=HTTP_KINDS
    )
    queued = 4 * FIT
    options = (
        *OPTIONS,
        *("--num-gpu-blocks-override", str(FIT * PAGES_EACH + 1), "--max-num-seqs", "64"),
        *("--max-num-queued-reqs", str(queued)),
    )
    levels = []
    with launch(MODEL, options, args.start_seconds) as server:
        for clients in (1, FIT, queued, 10 * FIT):
            level = asyncio.run(
                over_http(server.url, asks, clients, args.http, args.deadline, args.seed)
            )
            shown = {k: v for k, v in level.items() if k != "traffic"}
            print(f"http: {json.dumps(shown)}", flush=True)
            levels.append(level)
        errors = log_errors(server.read_log())
        alive = server.process.poll() is None
    return {
        "server": f"vllm serve {MODEL} {' '.join(options)}",
        "levels": levels,
        "log_errors": errors[:20],
        "alive": alive,
    }


HTTP_KINDS = ("greedy", "long prompt", "thresholds", "random tokens", "endless", "drawn")


def ratio(levels: Sequence[dict[str, Any]], figure: str) -> float:
    """What is left of the best throughput at the last, the highest load."""
    return round(levels[-1][figure] / max(level[figure] for level in levels), 2)


def passed(report: dict[str, Any]) -> bool:
    """All right, in order, nothing left, every level done; preempted under the highest load."""
    levels = report["in_process"]
    good = all(not (level["wrong"] or level["out_of_order"] or level["leaks"]) for level in levels)
    good = good and levels[-1]["preemptions"] > 0
    if http := report.get("http"):
        good = good and http["alive"] and not http["log_errors"]
        for level in http["levels"]:
            good = good and level["within_deadline"] and not level["left"]
            good = good and not level["traffic"]["wrong"]
        good = good and http["levels"][-1]["traffic"]["refused_as_they_must_be"].get("503", 0) > 0
    return bool(good)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--times", type=float, nargs="+", default=[0.125, 0.5, 1, 2, 5, 10], help="times what fits"
    )
    parser.add_argument(
        "--http", type=int, default=400, help="requests per level; 0: not over HTTP"
    )
    parser.add_argument("--asks", type=int, default=120, help="distinct requests over HTTP")
    parser.add_argument(
        "--deadline", type=float, default=ANSWER_SECONDS, help="seconds per request"
    )
    parser.add_argument("--start-seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_d2f import register

    register()
    report = environment(
        args.seed, sys.argv[1:] if argv is None else argv, "benchmarks.reliability.overload"
    )
    report |= {"fit": FIT, "pages": FIT * PAGES_EACH, "page_tokens": PAGE}
    report["in_process"] = in_process(args.times, args.seed)
    report["cpu_throughput_left"] = ratio(report["in_process"], "tokens_per_cpu_second")
    if args.http:
        report["http"] = http_part(args)
        report["http_throughput_left"] = ratio(report["http"]["levels"], "tokens_per_second")
    report["passed"] = passed(report)
    print(f"passed: {report['passed']}, left of the best: {report['cpu_throughput_left']} per CPU")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
