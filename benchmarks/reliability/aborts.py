# SPDX-License-Identifier: Apache-2.0
"""Random aborts at every stage: nothing is left behind, and nobody else notices.

    python -m benchmarks.reliability.aborts --aborts 10000 --http 500 \
        --json benchmarks/results/reliability_aborts.json

Two engines in this process, one after the other: d2f-tiny as it is, whose prompts are prefilled
whole, and with block-causal prompts, which are cut into chunks. Pages, slots and the token budget
are too few for the requests, so that some wait, some are preempted and some windows are held back.
Requests are aborted between steps and during a forward, twice, and after their end; new ones take
their slots, some under the same id. Between, the prefix cache is reset with all requests running,
and the scheduler is paused and goes on. Every request that ends by itself is compared with the
reference. Now and then everything is drained and what the engine still holds is
counted (`inside.Inside.leaks`). Over HTTP (`--http`) clients close their connections instead.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.record import environment
from benchmarks.harness.server import launch
from benchmarks.reliability.asks import WINDOW, Ask, answer_of, known_answers, make_asks
from benchmarks.reliability.inside import STAGES, Inside
from benchmarks.reliability.server import log_errors, settle
from benchmarks.reliability.traffic import (
    MODEL,
    SERVER_OPTIONS,
    Client,
    make_http_asks,
    server_config,
)
from benchmarks.reliability.traffic import WINDOW as HTTP_WINDOW
from benchmarks.reliability.truth import Known, load_truth

MAX_LEN = 320
PAGES = 40
"""Of 32 tokens each."""
ENGINES: dict[str, dict[str, Any]] = {
    "whole prompts": {
        "max_num_batched_tokens": MAX_LEN,
        "additional_config": {"d2f": {"block_size": 4, "max_blocks": 1, "window": WINDOW}},
    },
    "prompts in chunks": {
        "max_num_batched_tokens": WINDOW + 32,
        "additional_config": {
            "d2f": {
                "block_size": 16,
                "max_blocks": 1,
                "window": WINDOW,
                "prompt_attention": "block_causal",
            }
        },
    },
}
"""Options of the engines by what they do with prompts."""

PROMPT_BLOCK = {"whole prompts": None, "prompts in chunks": 16}


def start_engine(name: str) -> Any:
    """An engine that is short of everything."""
    from benchmarks.parity import start_engine as start

    options = ENGINES[name]
    return start(
        "d2f-tiny",
        window=WINDOW,
        max_model_len=MAX_LEN,
        max_num_seqs=24,
        # Room for some of them at their full length.
        num_gpu_blocks_override=PAGES,
        enable_prefix_caching=True,
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        **options,
    )


@dataclass
class Tally:
    """What happened.

    Attributes:
        aborted: by stage.
        mid_step: aborts that came while a forward ran.
        equal, ties, wrong: requests that ended by themselves, as expected, after a decision that
            rounding may turn, and otherwise (what was asked and answered).
        successors: of the equal ones, those whose slot had an aborted request before.
        leaks: what was left over at a drain.
    """

    aborted: Counter[str] = field(default_factory=Counter)
    mid_step: int = 0
    equal: int = 0
    ties: int = 0
    successors: int = 0
    reused_ids: int = 0
    drains: int = 0
    resets: int = 0
    pauses: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    leaks: list[dict[str, int]] = field(default_factory=list)

    @property
    def aborts(self) -> int:
        return sum(self.aborted.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "aborts": self.aborts,
            "by_stage": {stage: self.aborted[stage] for stage in STAGES},
            "during_a_forward": self.mid_step,
            "under_a_used_id": self.reused_ids,
            "completed_equal": self.equal,
            "completed_ties": self.ties,
            "completed_wrong": len(self.wrong),
            "in_a_slot_after_an_aborted_request": self.successors,
            "resets_of_the_prefix_cache": self.resets,
            "pauses": self.pauses,
            "drains": self.drains,
            "leaks": self.leaks,
            "differences": self.wrong[:10],
        }


class Storm:
    """Requests and aborts on one engine."""

    def __init__(self, llm: Any, asks: Sequence[Ask], known: Sequence[Known], seed: int) -> None:
        self.asks, self.known, self.rng = asks, known, random.Random(seed)
        self.inside = Inside(llm)
        self.tally = Tally()
        self.live: dict[str, int] = {}
        self.ended: list[str] = []
        self.aborted_ids: list[str] = []
        self.count = 0
        self._slot_of: dict[str, int] = {}
        self._before: dict[str, str] = {}
        self._gone: set[str] = set()
        self._watch_slots()

    def run(self, aborts: int, drain_every: int = 400, progress: Any = None) -> Tally:
        """Until so many requests were aborted; the last drain included."""
        since = 0
        while self.tally.aborts < aborts:
            while len(self.live) < self.rng.randint(8, 40):
                self._add()
            before = self.tally.aborts
            for _ in range(self.rng.randint(0, 5)):
                if self.tally.aborts < aborts:
                    self._abort_one()
            self._disturb()
            for output in self.inside.engine.step():
                self._take(output)
            since += self.tally.aborts - before
            if progress is not None:
                progress.update(self.tally.aborts - before)
            if since >= drain_every:
                since = 0
                self._drain()
        self._drain()
        return self.tally

    def _add(self) -> None:
        index = self.rng.randrange(len(self.asks))
        ask = self.asks[index]
        if self.aborted_ids and self.rng.random() < 0.2:
            # A client that comes again under the id it gave up a moment ago.
            request_id = self.aborted_ids.pop()
            self.tally.reused_ids += 1
        else:
            self.count += 1
            request_id = f"r{self.count}"
        self._gone.discard(request_id)
        self.live[request_id] = index
        prompt: Any = {"prompt_token_ids": list(ask.case.prompt)}
        self.inside.engine.add_request(request_id, prompt, ask.sampling_params())

    def _abort_one(self) -> None:
        """A stage at random among those there are, then a request of it at random."""
        by_stage: dict[str, list[str]] = {}
        for request_id in self.live:
            by_stage.setdefault(self.inside.stage(request_id), []).append(request_id)
        if self.ended:
            by_stage["finished"] = self.ended
        if not by_stage:
            return
        stage = self.rng.choice(sorted(by_stage))
        request_id = self.rng.choice(by_stage[stage])
        self.tally.aborted[stage] += 1
        if stage == "finished":
            self.ended.remove(request_id)
            self.inside.abort([request_id])
            return
        mid_step = self.rng.random() < 0.3
        self.tally.mid_step += mid_step
        self.inside.abort([request_id], mid_step=mid_step)
        del self.live[request_id]
        self._gone.add(request_id)
        if self.rng.random() < 0.1:
            self.inside.abort([request_id, "never heard of"])  # once more, and somebody else
        if not mid_step:
            self.aborted_ids = [request_id]

    def _disturb(self) -> None:
        """What an operator may do to a server at work, each in one step of a hundred."""
        core, chance = self.inside.core, self.rng.random()
        if chance < 0.01:
            assert core.reset_prefix_cache(reset_running_requests=True)
            self.tally.resets += 1
        elif chance < 0.02:
            core.pause_scheduler("keep", clear_cache=self.rng.random() < 0.5)
            for _ in range(3):
                self.inside.engine.step()
            core.resume_scheduler()
            self.tally.pauses += 1

    def _take(self, output: Any) -> None:
        if not output.finished:
            return
        request_id = output.request_id
        index = self.live.pop(request_id, None)
        if index is None:
            self.tally.wrong.append({"answered though aborted": request_id})
            return
        self.ended = [*self.ended[-3:], request_id]
        known, got = self.known[index], answer_of(output)
        if got == known.answer:
            self.tally.equal += 1
            self.tally.successors += self._before.get(request_id, "") in self._gone
        elif known.tie:
            self.tally.ties += 1
        else:
            self.tally.wrong.append(
                {
                    "ask": str(self.asks[index]),
                    "expected": [list(known.answer.tokens), known.answer.forwards],
                    "got": [list(got.tokens), got.forwards],
                }
            )

    def _drain(self) -> None:
        """Let the others end, or give all up, and look what is left."""
        if self.rng.random() < 0.5:
            for request_id in self.live:
                self.tally.aborted[self.inside.stage(request_id)] += 1
                self._gone.add(request_id)
            self.inside.abort(list(self.live))
            self.live.clear()
        self.inside.drain(self._take)
        self.ended, self.aborted_ids = [], []
        self._slot_of.clear()
        self.tally.drains += 1
        if leaks := self.inside.leaks():
            self.tally.leaks.append(leaks)

    def _watch_slots(self) -> None:
        """Note who had a request's slot before it."""
        state = self.inside.state
        last: dict[int, str] = {}
        add_request = state.add_request

        def watched(slot: int, data: Any) -> None:
            request_id = data.req_id.rsplit("-", 1)[0]  # vLLM appends what makes it unique
            self._before[request_id] = last.get(slot, "")
            last[slot] = request_id
            add_request(slot, data)

        state.add_request = watched


def storm(name: str, aborts: int, asks: int, seed: int, progress: Any = None) -> dict[str, Any]:
    """Aborts on one of `ENGINES`, from its start to its end."""
    from benchmarks.parity import shut_down

    llm = start_engine(name)
    try:
        requests = make_asks(asks, seed, MAX_LEN, ruled=0.6)
        known = known_answers(requests, llm.llm_engine.vllm_config, PROMPT_BLOCK[name])
        run = Storm(llm, requests, known, seed)
        started = time.perf_counter()
        tally = run.run(aborts, progress=progress)
        return tally.as_dict() | {
            "preemptions": run.inside.scheduler.num_preempted,
            "windows_held_back": run.inside.held_back,
            "seconds": round(time.perf_counter() - started, 1),
        }
    finally:
        shut_down(llm)


async def _http_storm(url: str, aborts: int, seed: int) -> dict[str, Any]:
    """Clients of which most close their connection, until so many did."""
    asks = make_http_asks(80, seed, load_truth(server_config(), window=HTTP_WINDOW))
    asks = [ask for ask in asks if ask.known is not None]
    async with Client(url, 24) as client:

        async def one_client(rng: random.Random) -> None:
            while sum(client.tally.aborted.values()) < aborts:
                if rng.random() < 0.7:
                    await client.abort(rng.choice(asks), rng)
                else:
                    await client.ask(rng.choice(asks), stream=rng.random() < 0.5)

        await asyncio.gather(*(one_client(random.Random(seed + i)) for i in range(24)))
        return {"traffic": client.tally.as_dict(), "left": await settle(url, 60)}


def http_storm(aborts: int, seed: int) -> dict[str, Any]:
    """The same over HTTP, on a server with few pages."""
    options = (*SERVER_OPTIONS, "--kv-cache-memory-bytes", str(1 << 27), "--max-num-seqs", "8")
    with launch(MODEL, options, timeout=600) as server:
        report = asyncio.run(_http_storm(server.url, aborts, seed))
        report["log_errors"] = log_errors(server.read_log())[:20]
    report["server"] = f"vllm serve {MODEL} {' '.join(options)}"
    report["passed"] = not (report["left"] or report["log_errors"] or report["traffic"]["wrong"])
    return report


def passed(report: dict[str, Any]) -> bool:
    """Every stage was hit, nothing leaked, every answer was right."""
    runs = report["engines"].values()
    hit = {stage for run in runs for stage, count in run["by_stage"].items() if count}
    clean = all(not run["leaks"] and not run["completed_wrong"] for run in runs)
    http = report.get("http")
    return clean and hit == set(STAGES) and (http is None or http["passed"])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.aborts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--aborts", type=int, default=10_000, help="in all, over both engines")
    parser.add_argument("--asks", type=int, default=200, help="distinct requests")
    parser.add_argument("--http", type=int, default=500, help="aborts over HTTP; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from tqdm import tqdm

    from vllm_d2f import register

    register()
    report = environment(
        args.seed, sys.argv[1:] if argv is None else argv, "benchmarks.reliability.aborts"
    )
    share = -(-args.aborts // len(ENGINES))
    report["engines"] = {}
    with tqdm(total=share * len(ENGINES), desc="aborts", disable=None) as bar:
        for name in ENGINES:
            report["engines"][name] = storm(name, share, args.asks, args.seed, bar)
    for name, run in report["engines"].items():
        shown = {key: value for key, value in run.items() if key != "differences"}
        print(f"{name}: {json.dumps(shown)}", flush=True)
    _finish(report, args.json)
    if args.http:
        report["http"] = http_storm(args.http, args.seed)
        _finish(report, args.json)
    return 0 if report["passed"] else 1


def _finish(report: dict[str, Any], path: str | None) -> None:
    """Judge and write. The first part is kept if the second does not come to its end."""
    report["passed"] = passed(report)
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
