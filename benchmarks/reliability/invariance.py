# SPDX-License-Identifier: Apache-2.0
"""Batch invariance: what a greedy request is answered does not depend on the others.

    python -m benchmarks.reliability.invariance --requests 1000 \
        --json benchmarks/results/reliability_invariance.json

The same requests, greedy and in float32, under many settings, on d2f-tiny with whole prompts and
with block-causal ones, each in these ways:
`alone` one by one; `batch` all at once; `shuffled` all at once in another order; `arrivals` a few
more every few steps, shuffled; `crowd` among requests of other kinds (drawn, structured, with
penalties) that come, go and are aborted; `narrow` with so small a token budget that windows are
held back; `again` with prefix caching, once more on warm pages; `preempt` with so few pages
that requests lose theirs. All answers, tokens and forwards, must equal those of `alone` and of the
reference loop.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import environment
from benchmarks.parity import Answer, shut_down, start_engine
from benchmarks.reliability.asks import WINDOW, Ask, answer_of, known_answers, make_asks
from benchmarks.reliability.inside import Inside
from benchmarks.reliability.truth import Known

MAX_LEN = 320
PAGE = 32
PROMPTS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "block-causal prompts": {"prompt_attention": "block_causal"},
}
PROMPT_BLOCK = 16
WAYS = ("alone", "batch", "shuffled", "arrivals", "crowd", "narrow", "again", "preempt")
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    # A step holds one widest window, or the longest prompt: nearly all others wait.
    "narrow": {"max_num_batched_tokens": MAX_LEN},
    "cached": {"enable_prefix_caching": True},
    "few pages": {"num_gpu_blocks_override": -(-MAX_LEN // PAGE) + 8, "max_num_seqs": 32},
}
ENGINE_OF = {"narrow": "narrow", "again": "cached", "preempt": "few pages"}


def plain_asks(count: int, seed: int) -> list[Ask]:
    """Distinct greedy requests, end tokens ignored or not."""
    asks = make_asks(count, seed, MAX_LEN, ruled=0.0)
    return [Ask(ask.case, "endless" if ask.kind == "endless" else "greedy") for ask in asks]


def start(prompts: str, engine: str) -> Any:
    """One of `ENGINES` with one of `PROMPTS`."""
    section = {"block_size": PROMPT_BLOCK, "max_blocks": 1, "window": WINDOW} | PROMPTS[prompts]
    return start_engine(
        "d2f-tiny",
        window=WINDOW,
        max_model_len=MAX_LEN,
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        additional_config={"d2f": section},
        **ENGINES[engine],
    )


def answers(llm: Any, asks: Sequence[Ask], way: str, seed: int) -> list[Answer]:
    """All requests in one of `WAYS`."""
    rng = random.Random(seed)
    if way == "alone":
        return [_together(llm, [ask])[0] for ask in asks]
    if way == "arrivals":
        return _arriving(llm, asks, [], rng)
    if way == "crowd":
        crowd = make_asks(len(asks), rng.randrange(1 << 31), MAX_LEN, ruled=0.8)
        return _arriving(llm, asks, crowd, rng)
    if way == "again":
        _together(llm, asks)
    order = list(range(len(asks)))
    if way == "shuffled":
        rng.shuffle(order)
    by_index = dict(zip(order, _together(llm, [asks[i] for i in order]), strict=True))
    return [by_index[i] for i in range(len(asks))]


def _together(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    prompts = [{"prompt_token_ids": list(ask.case.prompt)} for ask in asks]
    params = [ask.sampling_params() for ask in asks]
    return [answer_of(output) for output in llm.generate(prompts, params, use_tqdm=False)]


def _arriving(
    llm: Any, asks: Sequence[Ask], crowd: Sequence[Ask], rng: random.Random
) -> list[Answer]:
    """Shuffled, some before every step, beside a crowd of which half is aborted."""
    engine = llm.llm_engine
    waiting = [(f"case-{i}", ask) for i, ask in enumerate(asks)]
    waiting += [(f"other-{i}", ask) for i, ask in enumerate(crowd)]
    rng.shuffle(waiting)
    found: dict[int, Answer] = {}
    to_abort: list[str] = []
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(rng.choice((0, 1, 2, 12)), len(waiting))):
            request_id, ask = waiting.pop()
            prompt: Any = {"prompt_token_ids": list(ask.case.prompt)}
            engine.add_request(request_id, prompt, ask.sampling_params())
            if request_id.startswith("other") and rng.random() < 0.5:
                to_abort.append(request_id)
        if to_abort and rng.random() < 0.5:
            engine.abort_request([to_abort.pop(rng.randrange(len(to_abort)))])
        if not engine.has_unfinished_requests():
            continue
        for output in engine.step():
            kind, _, index = output.request_id.partition("-")
            if output.finished and kind == "case":
                found[int(index)] = answer_of(output)
    return [found[i] for i in range(len(asks))]


def compare(
    asks: Sequence[Ask], known: Sequence[Known], alone: Sequence[Answer], got: Sequence[Answer]
) -> dict[str, Any]:
    """How many equal the reference, and the answer alone; what differs, ties apart."""
    wrong = [
        {"ask": str(ask), "expected": str(k.answer), "alone": str(a), "got": str(g)}
        for ask, k, a, g in zip(asks, known, alone, got, strict=True)
        if not k.tie and (g != k.answer or g != a)
    ]
    return {
        "of": len(asks),
        "as_the_reference": sum(g == k.answer for k, g in zip(known, got, strict=True)),
        "as_alone": sum(g == a for a, g in zip(alone, got, strict=True)),
        "wrong": len(wrong),
        "differences": wrong[:10],
    }


def run(
    prompts: str, asks: Sequence[Ask], ways: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Every way of one of `PROMPTS`. `alone` comes first."""
    results: dict[str, dict[str, Any]] = {}
    known: list[Known] = []
    alone: list[Answer] = []
    for engine in ENGINES:
        mine = [way for way in ways if ENGINE_OF.get(way, "plain") == engine]
        if not mine:
            continue
        llm = start(prompts, engine)
        try:
            inside = Inside(llm)
            if not known:
                block = PROMPT_BLOCK if "prompt_attention" in PROMPTS[prompts] else None
                known = known_answers(asks, llm.llm_engine.vllm_config, block)
            for way in mine:
                started, held = time.perf_counter(), inside.held_back
                before = inside.scheduler.num_preempted
                hits = inside.prefix_hits
                got = answers(llm, asks, way, seed)
                alone = alone or got
                inside.drain(lambda output: None)
                results[way] = compare(asks, known, alone, got) | {
                    "windows_held_back": inside.held_back - held,
                    "preemptions": inside.scheduler.num_preempted - before,
                    "pages_found": inside.prefix_hits - hits,
                    "leaks": inside.leaks(),
                    "seconds": round(time.perf_counter() - started, 1),
                }
                shown = {k: v for k, v in results[way].items() if k != "differences"}
                print(f"{prompts}, {way}: {json.dumps(shown)}", flush=True)
        finally:
            shut_down(llm)
    ties = sum(k.tie for k in known)
    results["reference"] = {
        "ties": ties,
        "tokens": sum(len(k.answer.tokens) for k in known),
        "forwards": sum(k.answer.forwards for k in known),
    }
    return results


def passed(report: dict[str, Any]) -> bool:
    """Nothing differs, nothing is left, and each way did what it is for."""
    for results in report["prompts"].values():
        ways = {name: r for name, r in results.items() if name in WAYS}
        if any(r["wrong"] or r["leaks"] for r in ways.values()):
            return False
        for way, figure in (
            ("narrow", "windows_held_back"),
            ("again", "pages_found"),
            ("preempt", "preemptions"),
        ):
            if way in ways and not ways[way][figure]:
                return False
    return True


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.invariance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument(
        "--causal-requests", type=int, default=200, help="of them also with block-causal prompts"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=list(WAYS[1:]))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_d2f import register

    register()
    report = environment(
        args.seed, sys.argv[1:] if argv is None else argv, "benchmarks.reliability.invariance"
    )
    asks = plain_asks(args.requests, args.seed)
    ways = ["alone", *args.ways]
    report["prompts"] = {}
    for name, count in zip(PROMPTS, (args.requests, args.causal_requests), strict=True):
        if count:
            report["prompts"][name] = run(name, asks[:count], ways, args.seed)
    report["passed"] = passed(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
