# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in this process, and what a batch of requests cost in it.

The clock hangs on the engine core's two doors: what the scheduler sends into a step and which
tokens come out of it. vLLM's own statistics stay off, as they would be paid per step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.workload import Item, grade, simulated


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gave and cost.

    Attributes:
        useful: tokens up to the end token, it included.
        raw: tokens decided, those behind the end token too.
        forwards: forwards the request took part in.
        computed: tokens run through the model after the prompt, all forwards together.
        first_s: from handing in the batch to the request's first tokens.
        last_s: the same to its last ones.
    """

    item: int
    final: bool
    exact: bool
    useful: int
    raw: int
    forwards: int
    computed: int
    prompt: int
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """One engine step.

    Attributes:
        requests: in the step.
        new: of them, those that enter with their prompt.
        tokens: in the step, prompts included.
        context: cached tokens that the others attend to.
        ms: wall time since the step before, everything that happened between included.
        cpu_ms: the same, CPU time of this process.
    """

    requests: int
    new: int
    tokens: int
    context: int
    ms: float
    cpu_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """One `LLM.generate` call (or one vanilla loop)."""

    seconds: float
    cpu_s: float
    steps: int
    answers: tuple[Answer, ...]
    peak_mib: float


@dataclass
class Clock:
    """When tokens came out of the engine, and what each step was made of."""

    began: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    steps: list[StepCost] = field(default_factory=list)
    _scheduled: tuple[int, int, int, int] | None = None
    _at: float = 0.0
    _cpu_at: float = 0.0

    def attach(self, llm: Any) -> "Clock":
        """Listen to an engine of this process."""
        client = llm.llm_engine.engine_core
        scheduler = client.engine_core.scheduler
        schedule, get_output = scheduler.schedule, client.get_output

        def timed_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                context = sum(output.scheduled_cached_reqs.num_computed_tokens)
                counts = output.num_scheduled_tokens
                new = len(output.scheduled_new_reqs)
                tokens = output.total_num_scheduled_tokens
                self._scheduled = (len(counts), new, tokens, context)
            return output

        def timed_get_output() -> Any:
            outputs = get_output()
            now, cpu = time.perf_counter(), time.process_time()
            for output in outputs.outputs:
                if output.new_token_ids:
                    self.first.setdefault(output.request_id, now)
                    self.last[output.request_id] = now
            if self._scheduled:
                spent = (1e3 * (now - self._at), 1e3 * (cpu - self._cpu_at))
                self.steps.append(StepCost(*self._scheduled, *spent))
                self._scheduled = None
            self._at, self._cpu_at = now, cpu
            return outputs

        scheduler.schedule, client.get_output = timed_schedule, timed_get_output
        return self

    def start(self) -> None:
        self.first.clear()
        self.last.clear()
        self.steps.clear()
        self.began = self._at = time.perf_counter()
        self._cpu_at = time.process_time()

    def stop(self) -> float:
        """Seconds since `start`. What came after the last step counts as part of it."""
        now, cpu = time.perf_counter(), time.process_time()
        last = self.steps[-1]
        self.steps[-1] = replace(
            last,
            ms=last.ms + 1e3 * (now - self._at),
            cpu_ms=last.cpu_ms + 1e3 * (cpu - self._cpu_at),
        )
        return now - self.began


class Engine:
    """vLLM with one model, asked in batches. D2F models and plain ones alike."""

    def __init__(
        self, model: str, *, mode: str, max_batch: int, max_tokens: int, options: dict[str, Any]
    ) -> None:
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        from vllm_d2f import register

        register()
        cpu = current_platform.is_cpu()
        defaults: dict[str, Any] = dict(
            dtype="float32" if cpu else "auto",
            enforce_eager=mode == "eager",
            max_num_seqs=max_batch,
            seed=0,
            # The same prompts are asked again and again, and must be computed each time.
            enable_prefix_caching=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        defaults |= {"kv_cache_memory_bytes": 1 << 28} if cpu else {}
        self.llm = LLM(model=model, **(defaults | options))
        # None, or the tokens per forward that are accepted whatever the model says.
        self.simulated = simulated(self.llm.llm_engine.model_config.hf_config)
        # Random weights and made-up acceptance end their answers anywhere: all get to the same end.
        endless = self.simulated is not None or options.get("load_format") == "dummy"
        self.sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=endless)
        self.tokenizer = self.llm.get_tokenizer()
        self.clock = Clock().attach(self.llm)

    def measure(self, items: Sequence[Item], batch_size: int, offset: int = 0) -> list[Batch]:
        """Answer the items in batches of `batch_size`, one `LLM.generate` call each."""
        starts = range(0, len(items), batch_size)
        return [self._batch(items[at : at + batch_size], offset + at) for at in starts]

    def steps(self, items: Sequence[Item], batch_size: int) -> list[StepCost]:
        """The cost of every step of `measure`."""
        costs: list[StepCost] = []
        for at in range(0, len(items), batch_size):
            self._batch(items[at : at + batch_size], at)
            costs += self.clock.steps
        return costs

    def _batch(self, items: Sequence[Item], offset: int) -> Batch:
        reset_peak()
        self.clock.start()
        cpu = time.process_time()
        outputs = self.llm.generate([i.question for i in items], self.sampling, use_tqdm=False)
        seconds, cpu_s = self.clock.stop(), time.process_time() - cpu
        # Requests enter and are numbered in the order of the prompts.
        ids = sorted(self.clock.last, key=_number)
        answers = tuple(
            self._answer(item, offset + at, output, self.clock.first[key], self.clock.last[key])
            for at, (item, output, key) in enumerate(zip(items, outputs, ids, strict=True))
        )
        return Batch(seconds, cpu_s, len(self.clock.steps), answers, peak_mib())

    def _answer(self, item: Item, index: int, output: Any, first: float, last: float) -> Answer:
        from vllm_d2f.metrics import denoising_forwards

        completion = output.outputs[0]
        tokens = len(completion.token_ids)
        counters = completion.spec_decode_metrics
        graded = grade(item, completion.text, completion.finish_reason == "stop")
        return Answer(
            item=index,
            final=graded.final,
            exact=graded.exact,
            useful=tokens,
            raw=tokens,
            forwards=tokens if counters is None else denoising_forwards(completion),
            computed=tokens if counters is None else counters.num_draft_tokens,
            prompt=len(output.prompt_token_ids),
            first_s=first - self.clock.began,
            last_s=last - self.clock.began,
        )


def _number(request_id: str) -> int:
    """vLLM numbers the requests of `LLM.generate`; a suffix makes the id unique."""
    return int(request_id.split("-")[0])


def reset_peak() -> None:
    """Let the peak of this process's memory start over, where the kernel offers it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mib() -> float:
    """Peak resident memory since `reset_peak`, or of the device where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
