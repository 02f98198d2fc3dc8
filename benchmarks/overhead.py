# SPDX-License-Identifier: Apache-2.0
"""What vllm-d2f adds to a step: everything but the model's forward and the logits.

    python -m benchmarks.overhead

Counted: the sampler without the language-model head (window update, rows, bookkeeping), the model
state (input and attention metadata, vLLM's own part of it included), the scheduler's additions, and
the CPU stand-ins for Triton kernels. The windows are 4 blocks of 32, all open, in every request.
CPU time of the thread that runs the step is reported beside wall time: on a shared machine the
former is what the code costs.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness import record
from benchmarks.harness.engine import core_of, greedy, runner_of, start_engine
from benchmarks.harness.record import Record
from benchmarks.harness.workload import resolve_model
from vllm_d2f.d2f import D2FParams

BLOCK, BLOCKS = 32, 4
LIMIT_MS = {1: 1.5, 64: 3.0}
MOST_STEPS = 26
"""The number of steps for which all windows stay fully open."""
UNITS = {
    "added_cpu_ms": "milliseconds of CPU time a step that vllm-d2f adds, median; limit_ms: at most",
    "added_wall_ms": "the same of wall time",
    "cpu_ms": "milliseconds of CPU time a step by part; logits and model are not counted as added",
}


class Meter:
    """Exclusive time of the functions it wraps, by label, summed over a step."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self._stack: list[list[float]] = []

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Replace `owner.name` by a timed version."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._stack.append([0.0, 0.0])
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
                nested = self._stack.pop()
                self.cpu[label] += cpu - nested[0]
                self.wall[label] += wall - nested[1]
                if self._stack:
                    self._stack[-1][0] += cpu
                    self._stack[-1][1] += wall

        setattr(owner, name, timed)

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return CPU and wall seconds by label since the last call."""
        taken = dict(self.cpu), dict(self.wall)
        self.cpu.clear()
        self.wall.clear()
        return taken


def instrument(llm: Any) -> Meter:
    """Time what vllm-d2f runs in each step of an engine of this process."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter
    from vllm_d2f.patches import cpu_kernels, p03_cpu_kernels

    core, runner = core_of(llm), runner_of(llm)
    meter = Meter()
    # `_sample_whole` is the part with the language-model head: timed apart, not counted.
    meter.wrap(runner.sampler.proposals, "_sample_whole", "logits")
    meter.wrap(type(runner.sampler), "__call__", "sampler")
    meter.wrap(runner.model_state, "prepare_inputs", "model state")
    meter.wrap(runner.model_state, "prepare_attn", "model state")
    meter.wrap(runner.model, "forward", "model")
    # vLLM's own scheduling is inside ours and not counted.
    meter.wrap(Scheduler, "schedule", "vllm scheduler")
    meter.wrap(Scheduler, "update_draft_token_ids", "vllm scheduler")
    meter.wrap(type(core.scheduler), "schedule", "scheduler")
    meter.wrap(type(core.scheduler), "update_draft_token_ids", "scheduler")
    for name in ("update_from_output", "_update_request_with_output"):
        meter.wrap(Scheduler, name, "vllm scheduler")
        meter.wrap(type(core.scheduler), name, "scheduler")
    if p03_cpu_kernels.needed():
        for name in ("gather_block_tables", "compute_slot_mappings"):
            meter.wrap(BlockTables, name, "stand-ins")
        meter.wrap(FusedStagedWriter, "apply", "stand-ins")
        _wrap_kernels(meter, cpu_kernels, p03_cpu_kernels)
    return meter


def _wrap_kernels(meter: Meter, cpu_kernels: Any, p03: Any) -> None:
    """Time our functions where vLLM launches them: the overrides keep references to them."""
    from vllm_d2f.patches.patch import find

    for target in p03.KERNELS:
        kernel = find("overhead", target)[2]
        for attribute, value in list(vars(kernel).items()):
            if callable(value) and value in vars(cpu_kernels).values():
                meter.wrap(kernel, attribute, "stand-ins")


def measure(llm: Any, meter: Meter, num_reqs: int, steps: int) -> dict[str, Any]:
    """Return median milliseconds per step, over `steps` steps with every window fully open."""
    # Open a block in each step whatever is decoded, and decode one position per step and block.
    params = D2FParams(BLOCK, BLOCKS, tau_add=0.0, tau_act=0.0, tau_conf=1.0)
    engine = llm.llm_engine
    vocab = llm.llm_engine.model_config.get_vocab_size()
    for index in range(num_reqs):
        prompt = [(7 * index + 3 * i) % (vocab - 2) for i in range(40)]
        request = greedy(2 * BLOCK * BLOCKS, params, ignore_eos=True, detokenize=False)
        engine.add_request(f"r{num_reqs}-{index}", {"prompt_token_ids": prompt}, request)
    for _ in range(BLOCKS + 2):
        engine.step()
    meter.take()
    per_step = []
    for _ in range(steps):
        engine.step()
        per_step.append(meter.take())
    while engine.has_unfinished_requests():
        engine.step()
    meter.take()
    ours = ("sampler", "model state", "scheduler", "stand-ins")
    labels = [*ours, "logits", "model", "vllm scheduler"]

    totals = [[1e3 * sum(s[k].get(x, 0.0) for x in ours) for s in per_step] for k in (0, 1)]
    added = [round(statistics.median(total), 3) for total in totals]
    return {
        "requests": num_reqs, "steps": steps, "limit_ms": LIMIT_MS.get(num_reqs),
        "added_cpu_ms": added[0], "added_wall_ms": added[1],
        "cpu_ms": {label: round(1e3 * statistics.median(s[0].get(label, 0.0) for s in per_step), 3)
                   for label in labels},
    }  # fmt: skip


def markdown(report: Mapping[str, Any]) -> list[str]:
    parts = list(report["rows"][0]["cpu_ms"])
    return [
        *record.head("What vllm-d2f adds to a step", report),
        f"Windows of {report['window']}, all open. CPU ms a step by part; logits, model and vLLM's",
        "own scheduler are not counted as added.",
        "",
        *record.table(
            ("requests", "added CPU ms", "limit", "added wall ms", *parts),
            ((r["requests"], r["added_cpu_ms"], r["limit_ms"] or "", r["added_wall_ms"],
              *(r["cpu_ms"][part] for part in parts)) for r in report["rows"]),
        ),
    ]  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("overhead", __doc__)
    add = parser.add_argument
    add("--model", default="d2f-tiny", help="embedded name or folder")
    add("--requests", type=int, nargs="+", default=[1, 8, 64])
    add("--steps", type=int, default=24, help="steps measured")
    args = parser.finish(argv, {"requests": [1, 8], "steps": 6}, ("requests", "steps"))
    if args.steps > MOST_STEPS:
        parser.error(f"--steps must be 1 to {MOST_STEPS}")
    return args


def overhead(run: Record) -> int:
    """Measure and report. Return 1 if a limit is missed."""
    import torch

    args = run.args
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = resolve_model("--model", args.model)
    most = max(64, *args.requests)
    llm = start_engine(model, window=BLOCK * BLOCKS, max_model_len=512, max_num_seqs=most)
    meter = instrument(llm)
    measure(llm, meter, 1, 4)  # warm-up
    rows = [
        run.point(f"{n} requests", functools.partial(measure, llm, meter, n, args.steps))
        for n in args.requests
    ]
    run.need_all()
    window, threads = f"{BLOCKS} blocks of {BLOCK}", torch.get_num_threads()
    run.write(run.report(window=window, threads=threads, units=UNITS, rows=rows))
    return int(any(r["limit_ms"] and r["added_cpu_ms"] > r["limit_ms"] for r in rows))


main = record.command(parse, overhead, markdown)

if __name__ == "__main__":
    sys.exit(main())
