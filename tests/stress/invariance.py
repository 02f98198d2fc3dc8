# SPDX-License-Identifier: Apache-2.0
"""Batch invariance: the answer to a greedy request does not depend on the others.

The same requests, greedy and in float32, under many settings, in each of these ways:
`alone` one by one; `batch` all at once; `shuffled` all at once in another order; `arrivals` a few
more every few steps, shuffled; `crowd` among requests of other kinds (drawn, structured, with
penalties) that come, go and are aborted; `narrow` with so small a token budget that windows are
held back; `again` with prefix caching, once more on warm pages; `preempt` with so few pages
that requests lose theirs. All answers, tokens and forwards, must equal those of `alone` and of the
reference loop.
"""

import random
import time
from collections.abc import Sequence
from typing import Any

from stress.engine_state import MAX_LEN, PAGE, EngineState, engine
from stress.traffic import (
    ENGINE_WINDOW,
    PLAIN,
    RULED,
    SETTINGS,
    Ask,
    Known,
    Reference,
    engine_answer,
    make_asks,
)

ENGINES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ("alone", "batch", "shuffled", "arrivals", "crowd")),
    # A step holds one widest window, or the longest prompt: nearly all others wait.
    "narrow": ({"max_num_batched_tokens": MAX_LEN}, ("narrow",)),
    "cached": ({"enable_prefix_caching": True}, ("again",)),
    "few pages": (
        {"num_gpu_blocks_override": -(-MAX_LEN // PAGE) + 8, "max_num_seqs": 32},
        ("preempt",),
    ),
}
"""Options of each engine, and the ways it is for."""
MUST_HAPPEN = {
    "narrow": "windows_held_back",
    "again": "pages_found",
    "preempt": "preemptions",
}
"""What must happen in a way: if it did not, the way has tested nothing."""


def answers(llm: Any, asks: Sequence[Ask], way: str, seed: int) -> list[Known]:
    """Answer all requests in one of the ways."""
    rng = random.Random(seed)
    if way == "alone":
        return [_together(llm, [ask])[0] for ask in asks]
    if way in ("arrivals", "crowd"):
        others = make_asks(len(asks), seed, RULED, SETTINGS) if way == "crowd" else []
        return _arriving(llm, asks, others, rng)
    if way == "again":
        _together(llm, asks)
    order = list(range(len(asks)))
    if way == "shuffled":
        rng.shuffle(order)
    by_index = dict(zip(order, _together(llm, [asks[i] for i in order]), strict=True))
    return [by_index[i] for i in range(len(asks))]


def _together(llm: Any, asks: Sequence[Ask]) -> list[Known]:
    prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
    params = [ask.sampling_params() for ask in asks]
    return [engine_answer(output) for output in llm.generate(prompts, params, use_tqdm=False)]


def _arriving(
    llm: Any, asks: Sequence[Ask], crowd: Sequence[Ask], rng: random.Random
) -> list[Known]:
    """Run shuffled requests, some before every step, beside others of which half are aborted."""
    state = EngineState(llm)
    waiting = [(f"case-{i}", ask) for i, ask in enumerate(asks)]
    waiting += [(f"other-{i}", ask) for i, ask in enumerate(crowd)]
    rng.shuffle(waiting)
    found: dict[int, Known] = {}
    to_abort: list[str] = []
    while waiting or state.engine.has_unfinished_requests():
        for _ in range(min(rng.choice((0, 1, 2, 12)), len(waiting))):
            request_id, ask = waiting.pop()
            state.add(request_id, ask)
            if request_id.startswith("other") and rng.random() < 0.5:
                to_abort.append(request_id)
        if to_abort and rng.random() < 0.5:
            state.abort([to_abort.pop(rng.randrange(len(to_abort)))])
        if not state.engine.has_unfinished_requests():
            continue
        for output in state.engine.step():
            kind, _, index = output.request_id.partition("-")
            if output.finished and kind == "case":
                found[int(index)] = engine_answer(output)
    return [found[i] for i in range(len(asks))]


def compare(asks: Sequence[Ask], alone: Sequence[Known], got: Sequence[Known]) -> dict[str, Any]:
    """Count the answers that equal the reference, and the one alone. List the others, not ties."""
    rows = [(ask, ask.known[0], a, g) for ask, a, g in zip(asks, alone, got, strict=True)]
    wrong = [
        {"ask": str(ask), "alone": str(a), "got": str(g)}
        for ask, known, a, g in rows
        if not known.tie and not (g.equals(known) and g.equals(a))
    ]
    return {
        "of": len(asks),
        "as_the_reference": sum(g.equals(known) for _, known, _, g in rows),
        "as_alone": sum(g.equals(a) for _, _, a, g in rows),
        "wrong": len(wrong),
        "differences": wrong[:10],
    }


def run(requests: int, section: dict[str, Any], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Run every way, with whole or block-causal prompts as the D2F settings say."""
    asks = make_asks(requests, seed, PLAIN, SETTINGS)
    results: dict[str, dict[str, Any]] = {}
    alone: list[Known] = []
    for options, ways in ENGINES.values():
        with engine({"block_size": 16} | section, **options) as llm:
            state = EngineState(llm)
            if not alone:
                block = 16 if section else None
                config = llm.llm_engine.vllm_config
                reference = Reference(config, window=ENGINE_WINDOW, prompt_block=block)
                asks = reference.answers(asks)
            for way in ways:
                started, held, hits = time.perf_counter(), state.held_back, state.prefix_hits
                preempted = state.scheduler.num_preempted
                got = answers(llm, asks, way, seed)
                alone = alone or got
                state.drain()
                results[way] = compare(asks, alone, got) | {
                    "windows_held_back": state.held_back - held,
                    "preemptions": state.scheduler.num_preempted - preempted,
                    "pages_found": state.prefix_hits - hits,
                    "leaks": state.leaks(),
                    "seconds": round(time.perf_counter() - started, 1),
                }
    known = [ask.known[0] for ask in asks]
    results["reference"] = {
        "ties": sum(k.tie for k in known),
        "tokens": sum(len(k.tokens) for k in known),
        "forwards": sum(k.forwards for k in known),
    }
    return results


def failures(results: dict[str, dict[str, Any]]) -> list[str]:
    """Describe differences, leftovers, and ways that did not do what they are for."""
    ways = {way: result for way, result in results.items() if way != "reference"}
    found = [f"{way}: wrong answers" for way, result in ways.items() if result["wrong"]]
    found += [f"{way}: leaks" for way, result in ways.items() if result["leaks"]]
    found += [f"{way}: no {what}" for way, what in MUST_HAPPEN.items() if not ways[way][what]]
    return found
