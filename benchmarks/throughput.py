# SPDX-License-Identifier: Apache-2.0
"""Useful tokens per second, with the score beside it: D2F, autoregressive, vanilla diffusion.

    python -m benchmarks.throughput                       # the embedded models, about 15 minutes
    python -m benchmarks.throughput --quick               # under a minute
    python -m benchmarks.throughput --d2f FOLDER --ar FOLDER --teacher "" --data gsm8k_test.jsonl

All decoders stay loaded, each in its own process, and answer the same prompts in turn: in every run
each of them does every batch size once, so that a ratio compares what was measured moments apart. A
batch is one `LLM.generate` call. The prefix cache is off, the prompts' time is included.

Vanilla diffusion is the teacher in plain transformers (`benchmarks/vanilla.py`), one prompt at a
time; `512:4` means a canvas of 512 positions and four tokens per step. In each run it gets as many
prompts as fit `--vanilla-forwards`, others in the next run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.throughput_report import build, markdown
from benchmarks.workers import (
    Worker,
    WorkerError,
    close_all,
    device_share,
    most_modes,
    on_gpu,
    prepare_process,
)
from benchmarks.workload import (
    Item,
    UsageError,
    environment,
    load_items,
    parse_options,
    resolve_model,
    write_result,
)

if TYPE_CHECKING:
    from benchmarks.engine import Batch
    from benchmarks.vanilla import Setting

QUICK: dict[str, Any] = dict(
    batch_sizes=[1, 4], runs=2, prompts=4, modes=["eager"], vanilla=["64:1", "64:4"]
)


@dataclass(frozen=True)
class Key:
    """What was measured: `kind` is d2f, ar or vanilla; `mode` eager, compiled or `512:1`."""

    kind: str
    mode: str
    batch_size: int


Runs = dict[Key, list["list[Batch]"]]


@dataclass(frozen=True)
class Plan:
    """One measurement: everything that is asked, and how often."""

    items: tuple[Item, ...]
    batch_sizes: tuple[int, ...]
    runs: int
    prompts: int
    vanilla: tuple["Setting", ...]
    vanilla_forwards: int

    def asked(self, batch_size: int) -> tuple[Item, ...]:
        """At least `prompts`, in whole batches."""
        batches = -(-self.prompts // batch_size)
        return self.items[: batches * batch_size]

    def asked_vanilla(self, setting: "Setting", run: int) -> tuple[int, tuple[Item, ...]]:
        """The first prompt's number and the prompts of a run."""
        count = max(1, min(self.prompts, self.vanilla_forwards // setting.steps))
        start = run * count % (self.prompts - self.prompts % count)
        return start, self.items[start : start + count]


def needed(batch_sizes: Sequence[int], prompts: int) -> int:
    """How many problems a plan asks at most."""
    return max(-(-prompts // size) * size for size in batch_sizes)


def measure(plan: Plan, engines: dict[tuple[str, str], Worker], vanilla: Worker | None) -> Runs:
    """All runs; after Ctrl-C those that were complete.

    In each run the decoders take turns at every batch size; who begins alternates.
    """
    from tqdm import tqdm

    for worker in engines.values():
        # What comes first pays for memory and code that are touched for the first time.
        for size in plan.batch_sizes:
            worker.measure(plan.items[: max(size, 2)], size)
    if vanilla:
        vanilla.measure(plan.items[:1], plan.vanilla[-1])
    runs: Runs = {}
    complete = 0
    total = plan.runs * (len(engines) * len(plan.batch_sizes) + len(plan.vanilla) * bool(vanilla))
    with tqdm(total=total, desc="measured", disable=None) as bar:
        try:
            for run in range(plan.runs):
                for key, batches in _run(plan, engines, vanilla, run):
                    runs.setdefault(key, []).append(batches)
                    bar.update()
                complete += 1
        except KeyboardInterrupt:
            if not complete:
                raise
            print(f"stopped; reporting the {complete} complete runs", file=sys.stderr)
    return {key: batches[:complete] for key, batches in runs.items()}


def _run(
    plan: Plan, engines: dict[tuple[str, str], Worker], vanilla: Worker | None, run: int
) -> "Iterator[tuple[Key, list[Batch]]]":
    """One run: every decoder once at every batch size."""
    for size in plan.batch_sizes:
        order = list(engines.items())
        for (kind, mode), worker in order if run % 2 == 0 else reversed(order):
            yield Key(kind, mode, size), worker.measure(plan.asked(size), size)
        # The runs of batch size 1 are what the teacher is paired with.
        if vanilla and size == min(plan.batch_sizes):
            for setting in plan.vanilla:
                start, items = plan.asked_vanilla(setting, run)
                yield Key("vanilla", str(setting), 1), vanilla.measure(items, setting, start)


def start(
    args: argparse.Namespace, models: dict[str, str], options: dict[str, Any]
) -> tuple[dict[tuple[str, str], Worker], Worker | None]:
    """All decoders, loaded. One after the other where they compile, for that takes every core, and
    on a GPU, whose free memory each of them measures."""
    engines: dict[tuple[str, str], Worker] = {}
    kinds = [kind for kind in ("d2f", "ar") if kind in models]
    vanilla = Worker("vanilla", model=models["vanilla"]) if "vanilla" in models else None
    options = device_share(len(args.modes) * len(kinds) + bool(vanilla), options)
    try:
        if vanilla and on_gpu():
            vanilla.wait()
        for mode in args.modes:
            for kind in kinds:
                engines[kind, mode] = Worker(
                    "engine",
                    model=models[kind],
                    mode=mode,
                    max_batch=max(args.batch_sizes),
                    max_tokens=args.max_tokens,
                    options=options,
                )
                if mode == "compiled" or on_gpu():
                    engines[kind, mode].wait()
        for worker in [*engines.values(), *([vanilla] if vanilla else [])]:
            worker.wait()
    except BaseException:
        close_all([*engines.values(), *([vanilla] if vanilla else [])])
        raise
    return engines, vanilla


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--d2f", default="d2f-tiny", help="D2F model: embedded name, folder or Hub id")
    add("--ar", default="ar-tiny", help='autoregressive model, "" for none')
    add("--teacher", default="dream-tiny", help='teacher for vanilla diffusion, "" for none')
    add("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    add("--runs", type=int, default=5)
    add("--prompts", type=int, default=32, help="prompts per run and batch size, at least")
    add("--max-tokens", type=int, default=64)
    add("--data", help='JSONL with "question" and "answer" (default: generated problems)')
    add(
        "--modes",
        nargs="+",
        choices=("eager", "compiled"),
        help="of vLLM (default: both, on a GPU compiled, as each is an engine of its own)",
    )
    add("--vanilla", nargs="+", default=["512:1", "512:4", "64:1", "64:4"], metavar="LEN:PER_STEP")
    add("--vanilla-forwards", type=int, default=512, help="forwards of the teacher per run")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for both vLLM engines")
    add("--seed", type=int, default=0, help="of the generated problems")
    add("--quick", action="store_true", help="a small measurement, under a minute")
    add("--json", help="write the result here, with a .md and a .png beside it")
    args = parser.parse_args(argv)
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    if min([*args.batch_sizes, args.runs, args.prompts, args.max_tokens]) < 1:
        parser.error("--batch-sizes, --runs, --prompts and --max-tokens must be at least 1")
    if args.teacher and min(args.batch_sizes) != 1:
        parser.error('the teacher is compared at batch size 1: add 1, or pass --teacher ""')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    prepare_process()
    named = {"d2f": ("--d2f", args.d2f), "ar": ("--ar", args.ar)}
    named["vanilla"] = ("--teacher", args.teacher)
    try:
        from benchmarks.vanilla import Setting

        plan = Plan(
            items=tuple(load_items(needed(args.batch_sizes, args.prompts), args.data, args.seed)),
            batch_sizes=tuple(sorted(set(args.batch_sizes))),
            runs=args.runs,
            prompts=args.prompts,
            vanilla=tuple(Setting.parse(text) for text in args.vanilla),
            vanilla_forwards=args.vanilla_forwards,
        )
        options = parse_options("--engine-args", args.engine_args)
        models = {kind: resolve_model(*given) for kind, given in named.items() if given[1]}
        if "d2f" not in models:
            raise UsageError("no model to measure: pass --d2f an embedded name or a folder")
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.modes = args.modes or most_modes()
    about = environment(
        args.seed, argv if argv is not None else sys.argv[1:], "benchmarks.throughput"
    )
    try:
        engines, vanilla = start(args, models, options)
        made_up = next((w.simulated for w in engines.values() if w.simulated is not None), None)
        try:
            runs = measure(plan, engines, vanilla)
        finally:
            close_all([*engines.values(), *([vanilla] if vanilla else [])])
    except WorkerError as error:
        print(f"error: a decoder failed: {error}", file=sys.stderr)
        return 1
    has_text = all(item.answer is not None for item in plan.items)
    names = {kind: Path(name).name for kind, (_, name) in named.items() if name}
    report = build(runs, about, names, args.max_tokens, has_text, made_up)
    write_result(report, markdown(report), args.json)
    if args.json:
        from benchmarks.plots import throughput

        throughput(report, Path(args.json).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
