# SPDX-License-Identifier: Apache-2.0
"""Time to first token and gaps between pieces: tokens as they are decided against whole blocks.

    python -m benchmarks.streaming            # d2f-tiny, 1 and 8 requests at a time
    python -m benchmarks.streaming --quick    # a few requests, for tests

The engine lets a token leave once every token before it is decided (`prefix`). Block-wise streaming
would let it leave when its block is committed (`block`): one forward after the block is full, or
with the last piece. When that is follows from the same run, so both are timed on the very same
forwards and differ in nothing else.
"""

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from benchmarks.harness.engine import shut_down, start_engine
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.workload import load_prompts, resolve_model

COLUMNS = ("first_token_ms", "gap_ms", "gap_p95_ms", "pieces", "tokens_per_piece")
UNITS = {
    "first_token_ms": "milliseconds from handing in the request to its first tokens, median",
    "gap_ms": "milliseconds between pieces of an answer, median; gap_p95_ms: 95th percentile",
    "pieces": "outputs per answer",
    "tokens_per_piece": "tokens of an output, on average",
}


@dataclass
class Timeline:
    """One request: when it was sent, and how many tokens were out after each of its outputs."""

    block_size: int
    sent: float
    outputs: list[tuple[float, int]] = field(default_factory=list)

    def prefix(self) -> list[tuple[float, int]]:
        """What happened: time and new tokens of each piece."""
        return _pieces(self.outputs)

    def block(self, steps: Sequence[float]) -> list[tuple[float, int]]:
        """What block-wise streaming would have sent; `steps` are the ends of all forwards.

        A forward commits the blocks that were full before it; the last one ends the request.
        """
        end, everything = self.outputs[-1]
        totals, waiting, out = [], deque(self.outputs), 0
        for at in steps:
            if self.sent < at < end:
                totals.append((at, out // self.block_size * self.block_size))
                while waiting and waiting[0][0] <= at:
                    out = waiting.popleft()[1]
        return _pieces([*totals, (end, everything)])


def _pieces(totals: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Time and count of new tokens, where there are any."""
    pieces, out = [], 0
    for at, total in totals:
        if total > out:
            pieces.append((at, total - out))
            out = total
    return pieces


def summary(sent: Sequence[float], pieces: Sequence[list[tuple[float, int]]]) -> dict[str, float]:
    """Figures over requests: medians of first tokens and gaps, and the shape of the pieces."""
    first = [1e3 * (p[0][0] - start) for start, p in zip(sent, pieces, strict=True)]
    gaps = sorted(
        1e3 * (b[0] - a[0]) for p in pieces for a, b in zip(p[:-1], p[1:], strict=True)
    ) or [0.0]
    tokens = sum(count for p in pieces for _, count in p)
    number = sum(map(len, pieces))
    return {
        "first_token_ms": round(statistics.median(first), 2),
        "gap_ms": round(statistics.median(gaps), 2),
        "gap_p95_ms": round(gaps[int(0.95 * (len(gaps) - 1))], 2),
        "pieces": round(number / len(pieces), 2),
        "tokens_per_piece": round(tokens / number, 2),
    }


def serve(
    llm: Any, prompts: Sequence[list[int]], params: Any, block_size: int, at_once: int
) -> Any:
    """Keep `at_once` requests in the engine; the timelines and the ends of all forwards."""
    engine, waiting = llm.llm_engine, deque(enumerate(prompts))
    lines: dict[str, Timeline] = {}
    steps: list[float] = []
    running = 0
    while waiting or running:
        while waiting and running < at_once:
            index, prompt = waiting.popleft()
            lines[str(index)] = Timeline(block_size, time.perf_counter())
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
            running += 1
        outputs = engine.step()
        steps.append(time.perf_counter())
        for output in outputs:
            lines[output.request_id].outputs.append((steps[-1], len(output.outputs[0].token_ids)))
            running -= output.finished
    return list(lines.values()), steps


def markdown(report: Mapping[str, Any]) -> list[str]:
    rows = (
        (at_once, way, *(figures[name] for name in COLUMNS))
        for at_once, ways in report["at_once"].items()
        for way, figures in ways.items()
    )
    return [
        *record.head("Tokens as they are decoded against whole blocks", report),
        *record.table(("at once", "stream", *COLUMNS), rows),
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("streaming", __doc__)
    add = parser.add_argument
    add("--model", default="d2f-tiny", help="embedded name or folder")
    add("--prompts", type=int, default=64)
    add("--max-tokens", type=int, default=128)
    add("--at-once", type=int, nargs="+", default=[1, 8])
    quick = {"prompts": 4, "at_once": [2]}
    return parser.finish(argv, quick, ("prompts", "max_tokens", "at_once"))


def streaming(run: Record) -> None:
    """Time both ways of streaming for each number of requests at once."""
    from transformers import AutoConfig
    from vllm import SamplingParams

    from vllm_d2f import register
    from vllm_d2f.settings import settings_from_dict

    register()
    args = run.args
    model = resolve_model("--model", args.model)
    config = AutoConfig.from_pretrained(model)
    if not hasattr(config, "d2f"):
        raise UsageError(f"--model {args.model} has no d2f section in its config")
    settings = settings_from_dict(config.d2f)
    block_size = settings.params.block_size
    max_model_len = min(config.max_position_embeddings, 1024)
    prompts = load_prompts(model, args.prompts, None, args.seed)
    prompts = [prompt[: max_model_len - args.max_tokens] for prompt in prompts]
    # To the end: answers of these problems alone would be too short to say much about gaps.
    params = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False
    )
    llm = start_engine(
        model, window=settings.window, max_model_len=max_model_len, additional_config={}
    )
    serve(llm, prompts[:2], params, block_size, 2)  # warm up

    def measure(at_once: int) -> dict[str, Any]:
        lines, steps = serve(llm, prompts, params, block_size, at_once)
        sent = [line.sent for line in lines]
        return {
            "prefix": summary(sent, [line.prefix() for line in lines]),
            "block": summary(sent, [line.block(steps) for line in lines]),
        }

    found = {n: run.point(str(n), partial(measure, n)) for n in args.at_once}
    shut_down(llm)
    run.need_all()
    report = run.report(
        units=UNITS,
        model=Path(args.model).name,
        block_size=block_size,
        prompts=len(prompts),
        at_once={str(n): ways for n, ways in found.items()},
        machine=f"{record.platform.machine()}, {record.platform.system()}, CPU, float32",
    )
    run.write(report)


def main(argv: Sequence[str] | None = None) -> int:
    return record.main(streaming, parse(argv), markdown)


if __name__ == "__main__":
    sys.exit(main())
