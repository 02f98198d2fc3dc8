# SPDX-License-Identifier: Apache-2.0
"""Stage d: steps and tokens per second of 7B and 8B shapes, D2F beside AR in the same vLLM.

`steps/...`: time of a step by requests and open blocks of 32, contexts of 512 and 2048, all windows
full. `host_ms` is the part of a step in which the host did not wait for the device. `speed/...`:
tokens per second of `LLM.generate` at 2, 2.9 and 4 tokens per forward (simulated), prompts of 512,
answers of 128, windows of 4 blocks. `memory`: 256 requests with windows of 128 at once.
Weights are dummies, so no time depends on what is decided.

`dream-full` and `dream-async` are `dream` with FULL CUDA graphs and with asynchronous scheduling,
at the sizes where the host's work shows: which of them becomes a default is decided by these.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from benchmarks.gpu import shapes
from benchmarks.gpu.engine import BLOCK, DummyEngine, Waited
from benchmarks.gpu.stage import Options, Points, Skip

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BLOCKS = (4, 1, 2, 8)
CONTEXT, LONG_CONTEXT = 512, 2048
RATES = (2.0, 2.9, 4.0)
ANSWER = 128
LEAST_STEPS, MOST_STEPS, STEP_SECONDS = 6, 24, 2.5
"""A point ends after so many steps, or so many seconds if there were enough."""
LASTING = 96
"""Answer tokens beyond the window: at one per forward requests stay under way for so long."""
KEPT_STEPS = 30
"""Steps of a point that stay in the file for fitting."""


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "full": {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
    "async": {"async_scheduling": True},
}
"""What follows the shape in a part's name, and the engine's arguments."""
VARIANT_REQUESTS = (1, 2, 4, 8, 16)


def points(part: str, options: Options) -> Points:
    name, _, variant = part.partition("-")
    changes = {} if options.rehearse and variant == "full" else VARIANTS[variant]
    engine = cache(lambda: DummyEngine(name, options, **changes))
    diffusion = name in shapes.D2F
    requests: tuple[int, ...] = VARIANT_REQUESTS if variant else REQUESTS
    contexts: tuple[int, ...] = (CONTEXT,) if variant else (CONTEXT, LONG_CONTEXT)
    answer = ANSWER
    if options.rehearse:
        requests, contexts, answer = (1, 8), (48, 96), 24
    elif options.quick:
        requests, contexts = (1, 4) if variant else (1, 4, 64), (CONTEXT,)
    yield f"{part}/start", lambda: start(engine())
    # A long context matters for the fit only: one window width is enough.
    grid = [(contexts[0], blocks) for blocks in (BLOCKS if diffusion else (1,))]
    grid += [(context, grid[0][1]) for context in contexts[1:]]
    for context, blocks in grid:
        for count in requests:
            key = f"{part}/steps/{context}/{blocks}/{count}"
            yield key, partial(_later, engine, step, count, context, blocks)
    for rate in RATES if diffusion else (1.0,):
        for count in requests:
            key = f"{part}/speed/{rate:g}/{count}"
            yield key, partial(_later, engine, speed, count, rate, contexts[0], answer)
    if not variant:
        yield f"{part}/memory", lambda: memory(engine(), max(requests), contexts[0])


def _later(engine: Callable[[], DummyEngine], measure: Callable, *arguments: Any) -> dict[str, Any]:
    """Start the engine when the first point needs it."""
    return measure(engine(), *arguments)


def start(engine: DummyEngine) -> dict[str, Any]:
    """What the engine is, and how long it took to start."""
    config = engine.llm.llm_engine.vllm_config
    return {
        "seconds": round(engine.start_s, 1),
        "cache_tokens": engine.cache_tokens,
        "page_size": int(config.cache_config.block_size),
        "attention": type(_first_backend(engine)).__name__,
        "cudagraph_mode": engine.graphs,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "weights_gb": round(shapes.weight_bytes(engine.name)["step"] / 1e9, 3),
    }


def _first_backend(engine: DummyEngine) -> Any:
    """The implementation of the first layer's attention."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    layers = get_layers_from_vllm_config(engine.llm.llm_engine.vllm_config, Attention)
    return next(iter(layers.values())).impl


def step(engine: DummyEngine, requests: int, context: int, blocks: int) -> dict[str, Any]:
    """The time of a step in which every window is full."""
    width = blocks * BLOCK if engine.diffusion else 1
    answer = width + LASTING
    if reason := engine.fits(requests, context + answer, requests * width):
        raise Skip(reason)
    if engine.diffusion:
        engine.simulate(1.0)
    clock, waited = engine.clock, Waited()
    full: list[tuple[float, float]] = []
    with engine.running(requests, context, blocks, answer) as run:
        clock.start()
        warm_until = _warm_up(engine, run, requests, width)
        began = time.monotonic()
        while len(full) < MOST_STEPS:
            if not engine.llm.llm_engine.has_unfinished_requests():
                raise RuntimeError(f"requests ended after {len(full)} full steps")
            at = len(clock.steps)
            waited.take()
            run()
            wait_ms = waited.take()
            for cost in clock.steps[at:]:
                if cost.tokens == requests * width and cost.requests == requests:
                    full.append((cost.ms, cost.ms - wait_ms))
            if len(full) >= LEAST_STEPS and time.monotonic() - began > STEP_SECONDS:
                break
            if len(clock.steps) > warm_until + 4 * MOST_STEPS:
                raise RuntimeError("windows do not stay full")
        steps = list(clock.steps)
    waited.stop()
    return {
        "tokens": requests * width,
        "context_tokens": requests * context,
        "ms": round(statistics.median(ms for ms, _ in full), 4),
        "ms_min": round(min(ms for ms, _ in full), 4),
        "host_ms": round(statistics.median(host for _, host in full), 4),
        "measured": len(full),
        "steps": [_row(s) for s in steps[-KEPT_STEPS:]],
        "entering": [_row(s) for s in steps if s.new][:KEPT_STEPS],
    }


def _warm_up(engine: DummyEngine, run: Any, requests: int, width: int) -> int:
    """Run until every window is full; the number of steps that took."""
    clock = engine.clock
    while not (
        clock.steps and clock.steps[-1].tokens == requests * width and not clock.steps[-1].new
    ):
        if not engine.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(f"requests ended before a step of {requests * width} tokens")
        run()
        if len(clock.steps) > 40 + requests:
            raise RuntimeError(f"no step of {requests * width} tokens in {len(clock.steps)}")
    for _ in range(2):
        run()
    return len(clock.steps)


def _row(cost: Any) -> list[float]:
    """[requests, new, tokens, context, ms]."""
    return [cost.requests, cost.new, cost.tokens, cost.context, round(cost.ms, 4)]


def speed(
    engine: DummyEngine, requests: int, rate: float, prompt: int, answer: int
) -> dict[str, Any]:
    """Tokens per second of a batch from its first prompt to its last token."""
    from benchmarks.engine import peak_mib, reset_peak
    from vllm_d2f.metrics import denoising_forwards

    width = 4 * BLOCK if engine.diffusion else 1
    if reason := engine.fits(requests, prompt + answer, requests * width):
        raise Skip(reason)
    if engine.diffusion:
        engine.simulate(rate)
    prompts: Any = engine.prompts(requests, prompt)
    sampling = engine.sampling(answer)
    seconds: list[float] = []
    times = 2 if requests <= 64 else 1
    reset_peak()
    engine.llm.generate(prompts, engine.sampling(max(8, answer // 8)), use_tqdm=False)  # warm-up
    for _ in range(times):
        engine.clock.start()
        outputs = engine.llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(engine.clock.stop())
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    first, last = engine.clock.first.values(), engine.clock.last.values()
    row = {
        "tokens": tokens,
        "seconds": round(min(seconds), 4),
        "tokens_per_s": round(tokens / min(seconds), 2),
        "steps": len(engine.clock.steps),
        "first_token_ms": round(1e3 * (statistics.median(first) - engine.clock.began), 2),
        "last_token_ms": round(1e3 * (statistics.median(last) - engine.clock.began), 2),
        "peak_mib": round(peak_mib(), 1),
        "prompt_tokens": prompt,
        "answer_tokens": answer,
    }
    if engine.diffusion:
        forwards = sum(denoising_forwards(o.outputs[0]) for o in outputs)
        counters: list[Any] = [o.outputs[0].spec_decode_metrics for o in outputs]
        computed = sum(c.num_draft_tokens for c in counters)
        row["tokens_per_forward"] = round(tokens / forwards, 4)
        row["window_tokens"] = round(computed / forwards, 2)
    return row


def memory(engine: DummyEngine, requests: int, prompt: int) -> dict[str, Any]:
    """The most requests at once with windows of 4 blocks: do they run, and what is left?"""
    import torch

    width = 4 * BLOCK if engine.diffusion else 1
    while reason := engine.fits(requests, prompt + width + LASTING, requests * width):
        if prompt > 64 and "cache" in reason:
            prompt //= 2  # full multi-head caches of 256 long prompts are larger than the device
        else:
            raise Skip(reason)
    if engine.diffusion:
        engine.simulate(1.0)
    with engine.running(requests, prompt, 4, width + LASTING) as run:
        engine.clock.start()
        for _ in range(12 + requests):
            run()
            if engine.clock.steps and engine.clock.steps[-1].tokens >= requests * width:
                break
        else:
            raise RuntimeError(f"never {requests} full windows in one step")
        run()
    row: dict[str, Any] = {
        "requests": requests,
        "prompt_tokens": prompt,
        "step_tokens": requests * width,
        "cache_tokens": engine.cache_tokens,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        row |= {
            "free_mib": free >> 20,
            "total_mib": total >> 20,
            "peak_allocated_mib": torch.cuda.max_memory_allocated() >> 20,
        }
    return row
