# SPDX-License-Identifier: Apache-2.0
"""Random aborts at every stage leave nothing behind and change no other request.

On an engine of this process pages, slots and the token budget are too few for the requests, so that
some wait, some are preempted and some windows are held back. Requests are aborted between steps and
during a forward, twice, and after their end; new ones take their slots, some under the same id.
Between, the prefix cache is reset with all requests running, and the scheduler is paused and goes
on. Over HTTP clients close their connections instead.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stress.engine_state import MAX_LEN, STAGES, EngineState, engine
from stress.server import settle
from stress.traffic import (
    ENGINE_WINDOW,
    PLAIN,
    RULED,
    SETTINGS,
    Ask,
    Client,
    Reference,
    engine_answer,
    make_asks,
)

SHORT_OF_EVERYTHING: dict[str, Any] = {
    "max_num_seqs": 24,
    # Room for some of them at their full length.
    "num_gpu_blocks_override": 40,
    "max_num_batched_tokens": MAX_LEN,
    "enable_prefix_caching": True,
}
CHUNKED = {"block_size": 16, "prompt_attention": "block_causal"}
PROMPTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole prompts": ({}, {}),
    "prompts in chunks": (CHUNKED, {"max_num_batched_tokens": ENGINE_WINDOW + 32}),
}
"""What engines do with prompts: D2F settings, and options of the engine."""


class Storm:
    """Requests and aborts on one engine.

    Attributes:
        aborted: by stage.
        mid_step: aborts that came while a forward ran.
        equal, ties, wrong: requests that ended by themselves, as expected, after a decision that
            rounding may turn, and otherwise (what was asked and answered).
        successors: of the equal ones, those whose slot had an aborted request before.
        leaks: what was left over at a drain.
    """

    def __init__(self, llm: Any, asks: Sequence[Ask], seed: int) -> None:
        self.asks, self.rng, self.engine = asks, random.Random(seed), EngineState(llm)
        self.aborted: Counter[str] = Counter()
        self.mid_step = self.equal = self.ties = self.successors = 0
        self.reused_ids = self.drains = self.resets = self.pauses = 0
        self.wrong: list[dict[str, Any]] = []
        self.leaks: list[dict[str, int]] = []
        self._live: dict[str, Ask] = {}
        self._ended: list[str] = []
        self._reusable: list[str] = []
        self._gone: set[str] = set()
        self._count = 0
        self._watch_slots()

    def run(self, aborts: int, drain_every: int = 400) -> "Storm":
        """Run until so many requests were aborted, the last drain included."""
        next_drain = drain_every
        while self.aborted.total() < aborts:
            while len(self._live) < self.rng.randint(8, 40):
                self._add()
            for _ in range(self.rng.randint(0, 5)):
                if self.aborted.total() < aborts:
                    self._abort_one()
            self._disturb()
            for output in self.engine.engine.step():
                self._take(output)
            if self.aborted.total() >= next_drain:
                next_drain = self.aborted.total() + drain_every
                self._drain()
        self._drain()
        return self

    def as_dict(self) -> dict[str, Any]:
        return {
            "aborts": self.aborted.total(),
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
            "preemptions": self.engine.scheduler.num_preempted,
            "windows_held_back": self.engine.held_back,
        }

    def _add(self) -> None:
        ask = self.rng.choice(self.asks)
        if self._reusable and self.rng.random() < 0.2:
            # A client that comes again under the id that it gave up a moment ago.
            request_id = self._reusable.pop()
            self.reused_ids += 1
        else:
            self._count += 1
            request_id = f"r{self._count}"
        self._gone.discard(request_id)
        self._live[request_id] = ask
        self.engine.add(request_id, ask)

    def _abort_one(self) -> None:
        """Abort a random request at a random one of the stages that occur now."""
        by_stage: dict[str, list[str]] = {}
        for request_id in self._live:
            by_stage.setdefault(self.engine.stage(request_id), []).append(request_id)
        if self._ended:
            by_stage["finished"] = self._ended
        if not by_stage:
            return
        stage = self.rng.choice(sorted(by_stage))
        request_id = self.rng.choice(by_stage[stage])
        self.aborted[stage] += 1
        if stage == "finished":
            self._ended.remove(request_id)
            self.engine.abort([request_id])
            return
        mid_step = self.rng.random() < 0.3
        self.mid_step += mid_step
        self.engine.abort([request_id], mid_step=mid_step)
        del self._live[request_id]
        self._gone.add(request_id)
        if self.rng.random() < 0.1:
            self.engine.abort([request_id, "an unknown id"])
        if not mid_step:
            self._reusable = [request_id]

    def _disturb(self) -> None:
        """Do what an operator may do to a running server, each in one step of a hundred."""
        core, chance = self.engine.core, self.rng.random()
        if chance < 0.01:
            assert core.reset_prefix_cache(reset_running_requests=True)
            self.resets += 1
        elif chance < 0.02:
            core.pause_scheduler("keep", clear_cache=self.rng.random() < 0.5)
            for _ in range(3):
                self.engine.engine.step()
            core.resume_scheduler()
            self.pauses += 1

    def _take(self, output: Any) -> None:
        if not output.finished:
            return
        request_id = output.request_id
        ask = self._live.pop(request_id, None)
        if ask is None:
            self.wrong.append({"answered though aborted": request_id})
            return
        self._ended = [*self._ended[-3:], request_id]
        (known,), got = ask.known, engine_answer(output)
        if got.equals(known):
            self.equal += 1
            self.successors += self._before.get(request_id, "") in self._gone
        elif known.tie:
            self.ties += 1
        else:
            self.wrong.append({"ask": str(ask), "got": str(got)})

    def _drain(self) -> None:
        """Let the others end, or abort them all, and look for what is left."""
        if self.rng.random() < 0.5:
            self.aborted.update(map(self.engine.stage, self._live))
            self._gone.update(self._live)
            self.engine.abort(list(self._live))
            self._live.clear()
        self.engine.drain(self._take)
        self._ended, self._reusable = [], []
        self.drains += 1
        if leaks := self.engine.leaks():
            self.leaks.append(leaks)

    def _watch_slots(self) -> None:
        """Note which request had a request's slot before it."""
        self._before: dict[str, str] = {}
        last: dict[int, str] = {}
        states = self.engine.states
        add = states.add

        def watched(slot: int, data: Any) -> None:
            request_id = data.req_id.rsplit("-", 1)[0]  # vLLM appends what makes it unique
            self._before[request_id] = last.get(slot, "")
            last[slot] = request_id
            add(slot, data)

        states.add = watched


def storm(prompts: str, aborts: int, asks: int = 200, seed: int = 0) -> dict[str, Any]:
    """Abort requests on one of `PROMPTS`, from the engine's start to its end."""
    section, options = PROMPTS[prompts]
    with engine(section, **(SHORT_OF_EVERYTHING | options)) as llm:
        config = llm.llm_engine.vllm_config
        block = section["block_size"] if section else None
        reference = Reference(config, window=ENGINE_WINDOW, prompt_block=block)
        requests = reference.answers(make_asks(asks, seed, PLAIN + RULED, SETTINGS))
        started = time.perf_counter()
        report = Storm(llm, requests, seed).run(aborts).as_dict()
        return report | {"seconds": round(time.perf_counter() - started, 1)}


async def over_http(url: str, asks: Sequence[Ask], aborts: int) -> dict[str, Any]:
    """Run clients, most of which close their connection, until so many did."""
    asks = [ask for ask in asks if ask.known]
    async with Client(url, 24) as client:

        async def one_client(rng: random.Random) -> None:
            while client.tally.aborted.total() < aborts:
                if rng.random() < 0.7:
                    await client.abort(rng.choice(asks), rng)
                else:
                    await client.ask(rng.choice(asks), stream=rng.random() < 0.5)

        await asyncio.gather(*(one_client(random.Random(seed)) for seed in range(24)))
        return {"traffic": client.tally.as_dict(), "left": await settle(url, 60)}


def failures(report: dict[str, Any]) -> list[str]:
    """Describe what went wrong: a stage that was not hit, a leak, a wrong answer."""
    runs = report["engines"].values()
    http = report.get("http", {"left": {}, "log_errors": [], "traffic": {"wrong": 0}})
    found = {
        f"no abort at stage {stage!r}": not any(run["by_stage"][stage] for run in runs)
        for stage in STAGES
    } | {
        "leaks": any(run["leaks"] for run in runs),
        "wrong answers": any(run["completed_wrong"] for run in runs),
        "wrong answers over HTTP": http["traffic"]["wrong"],
        "left over after HTTP": http["left"],
        "errors in the log": http["log_errors"],
    }
    return [what for what, happened in found.items() if happened]
