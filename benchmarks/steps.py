# SPDX-License-Identifier: Apache-2.0
"""Measure steps and tokens per second of 7B and 8B shapes on a GPU, D2F beside AR.

    python -m benchmarks.steps --json steps.json --minutes 6
    python -m benchmarks.steps --shapes dream --variant full --json dream-full.json
    python -m benchmarks.steps --rehearse

`SHAPE/steps/CONTEXT/BLOCKS/REQUESTS`: time of a step in which all windows of so many blocks of 32
are full. `SHAPE/speed/RATE/REQUESTS`: tokens per second of `LLM.generate` at so many tokens per
forward (simulated), windows of 4 blocks. `SHAPE/profile/REQUESTS`: one step under torch's profiler:
the largest kernels, the gaps in which none ran, and the calls in which the host stood still.
Weights are dummies, so no time depends on what is decoded. On a GPU a process measures one shape;
the same command continues with the next.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import engine as engines
from benchmarks.harness import record, shapes, timing
from benchmarks.harness.cost import step_floor_ms
from benchmarks.harness.engine import BLOCK, SMALL, DummyEngine, Limits, shut_down
from benchmarks.harness.record import Record

RATE = 2.9
"""Tokens per forward of the published 7B model."""
LEAST_STEPS, MOST_STEPS, STEP_SECONDS = 6, 24, 2.5
"""A point ends after MOST_STEPS, or after STEP_SECONDS with at least LEAST_STEPS."""
LASTING = 96
"""Answer tokens beyond the window. At one per forward, requests run for so many steps."""
KEPT_STEPS = 30
"""Steps of a point that stay in the file for fitting."""
PROFILED, TOP = 5, 25
"""Steps under the profiler, and kernels that are listed."""
WAITS = ("Synchronize", "cudaMemcpy", "cudaStreamWaitEvent", "cudaFree", "cudaMalloc")
FULL: dict[str, Any] = {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "full": FULL,
    "async": {"async_scheduling": True},
    "full_async": {**FULL, "async_scheduling": True},
    "eager": {"enforce_eager": True},
}
"""The engine's arguments of `--variant`."""
UNITS = {
    "ms": "milliseconds of a step, median; ms_min: the fastest",
    "floor_ms": "weights and cached keys read once, or the step's products, whichever takes longer",
    "steps": "requests, new ones, tokens, context tokens, milliseconds of single steps",
    "tokens_per_s": "from the first prompt to the last token of a batch; simulated acceptance",
}


def start(engine: DummyEngine, shape: str) -> dict[str, Any]:
    """Return what the engine is, and how long it took to start."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    config = engine.llm.llm_engine.vllm_config
    layer = next(iter(get_layers_from_vllm_config(config, Attention).values()))
    return {
        "seconds": round(engine.start_s, 1), "cache_tokens": engine.cache_tokens,
        "attention": type(layer.impl).__name__,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "weights_gb": round(shapes.weight_bytes(shape)["step"] / 1e9, 3),
    }  # fmt: skip


def width_of(engine: DummyEngine, blocks: int = 4) -> int:
    """Return the tokens of a request in a step."""
    return blocks * BLOCK if engine.diffusion else 1


def step(engine: DummyEngine, requests: int, context: int, blocks: int) -> dict[str, Any]:
    """Return the time of a step in which every window is full."""
    width = width_of(engine, blocks)
    answer = width + LASTING
    engine.fit(requests, context + answer, width)
    engine.simulate(1.0)
    clock = engine.clock
    full: list[float] = []
    with engine.running(requests, context, blocks, answer) as run:
        clock.start()
        warm_until = warm_up(engine, run, requests, width)
        began = time.monotonic()
        while len(full) < MOST_STEPS:
            if not engine.llm.llm_engine.has_unfinished_requests():
                raise RuntimeError(f"requests ended after {len(full)} full steps")
            at = len(clock.steps)
            run()
            costs = clock.steps[at:]
            full += [s.ms for s in costs if (s.tokens, s.requests) == (requests * width, requests)]
            if len(full) >= LEAST_STEPS and time.monotonic() - began > STEP_SECONDS:
                break
            if len(clock.steps) > warm_until + 4 * MOST_STEPS:
                raise RuntimeError("windows do not stay full")
        steps = list(clock.steps)
    # [requests, new, tokens, context, ms]
    rows = [[*astuple(s)[:4], round(s.ms, 4)] for s in steps]
    return {
        "tokens": requests * width, "context_tokens": requests * context, "measured": len(full),
        "ms": round(statistics.median(full), 4), "ms_min": round(min(full), 4),
        "steps": rows[-KEPT_STEPS:], "entering": [row for row in rows if row[1]][:KEPT_STEPS],
    }  # fmt: skip


def warm_up(engine: DummyEngine, run: Callable[[], Any], requests: int, width: int) -> int:
    """Run until every window is full. Return the number of steps."""
    steps, tokens = engine.clock.steps, requests * width
    while not (steps and steps[-1].tokens == tokens and not steps[-1].new):
        if not engine.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(f"requests ended before a step of {tokens} tokens")
        run()
        if len(steps) > 40 + requests:
            raise RuntimeError(f"no step of {tokens} tokens in {len(steps)}")
    for _ in range(2):
        run()
    return len(steps)


def speed(
    engine: DummyEngine, requests: int, rate: float, prompt: int, answer: int
) -> dict[str, Any]:
    """Measure the tokens per second of a batch, from its first prompt to its last token."""
    from vllm_d2f.metrics import denoising_forwards

    engine.fit(requests, prompt + answer, width_of(engine))
    engine.simulate(rate)
    prompts, seconds = engine.prompts(requests, prompt), []
    engines.reset_peak()
    engine.llm.generate(prompts, engine.sampling(max(8, answer // 8)), use_tqdm=False)  # warm-up
    for _ in range(2 if requests <= 64 else 1):
        engine.clock.start()
        outputs = engine.llm.generate(prompts, engine.sampling(answer), use_tqdm=False)
        seconds.append(engine.clock.stop())
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    first = statistics.median(engine.clock.first.values())
    row: dict[str, Any] = {
        "tokens": tokens, "seconds": round(min(seconds), 4),
        "tokens_per_s": round(tokens / min(seconds), 2), "steps": len(engine.clock.steps),
        "first_token_ms": round(1e3 * (first - engine.clock.began), 2),
        "peak_mib": round(engines.peak_mib(), 1), "prompt_tokens": prompt, "answer_tokens": answer,
        "token_budget": engine.limits.step_tokens + engine.limits.length,
    }  # fmt: skip
    if engine.diffusion:
        forwards = sum(denoising_forwards(o.outputs[0]) for o in outputs)
        computed = sum(o.outputs[0].spec_decode_metrics.num_draft_tokens for o in outputs)
        row["tokens_per_forward"] = round(tokens / forwards, 4)
        row["window_tokens"] = round(computed / forwards, 2)
    return row


# The profile.


@dataclass(frozen=True, slots=True)
class Span:
    """One event of a trace; microseconds on the trace's clock."""

    name: str
    begin: float
    end: float
    on_device: bool


def profile(engine: DummyEngine, requests: int, context: int) -> dict[str, Any]:
    """Trace some steps with full windows."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    width = width_of(engine)
    engine.fit(requests, context + width + LASTING, width)
    engine.simulate(1.0)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with engine.running(requests, context, 4, width + LASTING) as run:
        engine.clock.start()
        at = warm_up(engine, run, requests, width)
        with trace(activities=kinds) as traced:
            for _ in range(PROFILED):
                run()
        took = [step.ms for step in engine.clock.steps[at:]]
    row = profile_summary(spans_of(traced.events()), PROFILED)
    row["wall_ms_per_step"] = round(sum(took) / PROFILED, 4)
    if not row["kernels_per_step"]:
        ops = {found.key: found.self_cpu_time_total for found in traced.key_averages()}
        row["top_cpu"] = _largest(ops, PROFILED)
    return row


def spans_of(events: Iterable[Any]) -> list[Span]:
    """Return a trace's events, without named ranges.

    The host's ranges appear on the device too, over its kernels and gaps.
    """
    cuda = torch.autograd.DeviceType.CUDA
    return [
        Span(e.name, e.time_range.start, e.time_range.end, e.device_type == cuda)
        for e in events
        if not e.is_user_annotation
    ]


def profile_summary(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    """Return per step the device's busy and idle time, largest kernels and gaps, and host waits."""
    device = sorted((s for s in spans if s.on_device), key=lambda s: s.begin)
    kernels: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    gaps: dict[tuple[str, str], float] = defaultdict(float)
    busy = idle = 0.0
    until, before = (device[0].begin, "") if device else (0.0, "")
    for span in device:
        kernels[span.name] += span.end - span.begin
        counts[span.name] += 1
        if span.begin > until:
            idle += span.begin - until
            gaps[before, span.name] += span.begin - until
        # Streams overlap: time that is covered already counts once.
        busy += max(0.0, span.end - max(span.begin, until))
        if span.end >= until:
            until, before = span.end, span.name
    waits: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        host = not span.on_device and span.name.startswith("cuda")
        if host and any(part in span.name for part in WAITS):
            waits[span.name].append(span.end - span.begin)
    largest_gaps = sorted(gaps.items(), key=lambda item: -item[1])[:10]

    def ms(us: float) -> float:
        return round(us / steps / 1e3, 4)

    return {
        "device_busy_ms": ms(busy),
        "device_idle_ms": ms(idle),
        "kernels_per_step": round(len(device) / steps, 1),
        "top_kernels": _largest(kernels, steps, counts),
        "top_gaps": [{"after": a[:80], "before": b[:80], "ms_per_step": ms(us)}
                     for (a, b), us in largest_gaps],
        "waits": {name: {"per_step": round(len(times) / steps, 2), "ms_per_step": ms(sum(times))}
                  for name, times in sorted(waits.items())},
    }  # fmt: skip


def _largest(
    times: Mapping[str, float], steps: int, counts: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    total = sum(times.values()) or 1.0
    return [
        {"name": name[:160], "ms_per_step": round(us / steps / 1e3, 4),
         "share": round(us / total, 4),
         **({"per_step": round(counts[name] / steps, 2)} if counts else {})}
        for name, us in sorted(times.items(), key=lambda item: -item[1])[:TOP]
    ]  # fmt: skip


# The experiment.


def points(
    args: argparse.Namespace, shape: str, engine: Callable[[], DummyEngine]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield key and measurement of each point of a shape. The first one starts the engine."""

    def later(measure: Callable[..., Any], *given: Any) -> Callable[[], Any]:
        return lambda: measure(engine(), *given)

    diffusion = shape in shapes.D2F
    yield f"{shape}/start", later(start, shape)
    first = args.contexts[0]
    if "steps" in args.what:
        # A long context matters for the fit only: one window width is enough.
        grid = [(first, blocks) for blocks in (args.blocks if diffusion else (1,))]
        grid += [(context, grid[0][1]) for context in args.contexts[1:]]
        for context, blocks in grid:
            for count in args.requests:
                key = f"{shape}/steps/{context}/{blocks}/{count}"
                yield key, later(step, count, context, blocks)
    if "speed" in args.what:
        for rate in args.rates if diffusion else (1.0,):
            for count in args.requests:
                measure = later(speed, count, rate, first, args.answer)
                yield f"{shape}/speed/{rate:g}/{count}", measure
    if "profile" in args.what:
        for count in sorted({min(args.requests), min(max(args.requests), 64)}):
            yield f"{shape}/profile/{count}", later(profile, count, first)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("steps", __doc__)
    add, what = parser.add_argument, ["steps", "speed", "profile"]
    add("--shapes", nargs="+", choices=list(shapes.SHAPES), default=["dream", "qwen"])
    add("--what", nargs="+", choices=what, default=what)
    add("--variant", choices=list(VARIANTS), default="plain", help="engine arguments")
    add("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    add("--blocks", type=int, nargs="+", default=[4, 1, 2, 8], help="open blocks of 32 per window")
    add("--contexts", type=int, nargs="+", default=[512, 2048])
    add("--rates", type=float, nargs="+", default=[2.0, RATE, 4.0], help="tokens per forward")
    add("--gpu-memory-utilization", type=float, default=0.92, help="share of the device's memory")
    add("--answer", type=int, default=128, help="tokens of an answer where speed is measured")
    quick = {"requests": [1, 4, 64], "contexts": [512]}
    positive = ("requests", "blocks", "contexts", "rates", "answer")
    args = parser.finish(argv, quick, positive, rehearse=True)
    if args.rehearse:
        args.requests, args.contexts, args.answer = [1, 8], [48, 96], 24
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --rehearse runs tiny shapes on a CPU")
    return args


def steps(run: Record) -> None:
    """Measure shape by shape and report."""
    args = run.args
    device, dtype = ("cpu", torch.float32) if args.rehearse else ("cuda", torch.bfloat16)
    machine = run.point("machine", partial(timing.machine, torch.device(device), dtype))
    changes = dict(VARIANTS[args.variant])
    if args.rehearse:  # a CPU has no CUDA graphs
        changes.pop("compilation_config", None)
    step_tokens = max(args.requests) * 4 * BLOCK
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:

            @cache
            def engine(shape: str = shape) -> DummyEngine:
                where = shapes.write(Path(folder), shape, args.rehearse)
                limits = SMALL if args.rehearse else replace(Limits(), step_tokens=step_tokens)
                how: dict[str, Any] = dict(
                    diffusion=shape in shapes.D2F, limits=limits, small=args.rehearse,
                    gpu_memory_utilization=args.gpu_memory_utilization,
                )  # fmt: skip
                return DummyEngine(where, **how, **changes)

            for key, measure in points(args, shape, engine):
                run.point(key, measure, may_fail=True)
            if engine.cache_info().currsize:
                shut_down(engine().llm)
                if not args.rehearse:
                    run.stop()  # an engine leaves memory in use that the next one would miss
    measured = {key: value for key, value in run.points.items() if key != "machine"}
    report = run.report(
        simulated_tokens_per_forward=f"1 to {max(args.rates):g}", rehearse=args.rehearse,
        variant=args.variant, units=UNITS, floor=machine, points=measured,
    )  # fmt: skip
    run.write(report)


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return steps with their floor, speeds with their ratio to AR, profiles, and the bars."""
    found, machine = report["points"], report["floor"]

    def rows(what: str) -> list[tuple[str, list[str], Any]]:
        split = [(key.split("/"), value) for key, value in found.items()]
        return [(key[0], key[2:], value) for key, value in split if key[1] == what]

    def beside(shape: str, key: str, field: str) -> float | None:
        """Return the same figure of the autoregressive shape."""
        return found.get(f"{shapes.D2F.get(shape)}/{key}", {}).get(field)

    lines = [
        *record.head(f"Steps of 7B and 8B shapes, {report['variant']}", report),
        f"Copy {machine['copy_gb_per_s']} GB/s, product {machine['matmul_gflop_per_s']} GFLOP/s",
        "make the floors. Weights are dummies.",
        "",
        *(f"- {shape}: {p}" for shape, _, p in rows("start")),
        "",
        *record.bars(_bars(report, beside)),
    ]
    measured = []
    for shape, (context, blocks, requests), p in rows("steps"):
        floor = step_floor_ms(shape, p["tokens"], p["context_tokens"], machine)
        other = beside(shape, f"steps/{context}/1/{requests}", "ms")
        key = {"shape": shape, "context": context, "blocks": blocks, "requests": requests}
        ratios = {"times_floor": p["ms"] / floor, "times_ar": p["ms"] / other if other else None}
        measured.append({**key, **p, "floor_ms": floor, **ratios})
    names = "shape context blocks requests ms floor_ms times_floor times_ar"
    lines += record.columns(names, measured)
    measured = []
    for shape, (rate, requests), p in rows("speed"):
        other = beside(shape, f"speed/1/{requests}", "tokens_per_s")
        ratio = p["tokens_per_s"] / other if other else None
        key = {"shape": shape, "simulated_tokens_per_forward": rate, "requests": requests}
        measured.append({**key, **p, "times_ar": ratio})
    names = "shape simulated_tokens_per_forward requests tokens_per_s times_ar steps"
    lines += record.columns(f"{names} first_token_ms peak_mib", measured)
    for shape, (requests,), p in rows("profile"):
        head = "{wall_ms_per_step} ms a step, device busy {device_busy_ms} ms, idle "
        head += "{device_idle_ms} ms, {kernels_per_step} kernels"
        lines += [f"Profile of {shape}, {requests} request(s): {head.format(**p)}.", ""]
        kernels = [k | {"name": k["name"][:70].replace("|", "/")} for k in p["top_kernels"][:12]]
        lines += record.columns("name ms_per_step per_step share", kernels)
        lines += [f"- {n}: {w['per_step']:g} a step, {w['ms_per_step']} ms" for n, w in
                  p["waits"].items()]  # fmt: skip
        lines.append("")
    return [*lines, *record.misses(report)]


def _bars(
    report: Mapping[str, Any], beside: Callable[[str, str, str], float | None]
) -> Iterator[tuple[str, float | None, str, float]]:
    found = report["points"]
    for d2f, ar in shapes.D2F.items():
        if f"{d2f}/start" not in found or report["variant"] != "plain":
            continue
        ms = found.get(f"{d2f}/steps/512/4/1", {}).get("ms")
        other = beside(d2f, "steps/512/1/1", "ms")
        ratio = ms / other if ms and other else None
        yield f"{d2f}, 4 blocks of 32, 1 request: step / {ar}'s", ratio, "at most", 1.25
        if d2f == "dream":
            yield "the same step, ms", ms, "at most", 5.5
        for size in (1, 2, 4, 8):
            mine = found.get(f"{d2f}/speed/{RATE:g}/{size}", {}).get("tokens_per_s")
            other = beside(d2f, f"speed/1/{size}", "tokens_per_s")
            ratio = mine / other if mine and other else None
            what = f"{d2f} at {RATE:g} tokens per forward / {ar}, batch {size}"
            yield what, ratio, "at least", 2.5


main = record.command(parse, steps, markdown)

if __name__ == "__main__":
    sys.exit(main())
