# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine in this process, and what a batch of requests cost in it.

The clock hangs on the engine core's two ends: what the scheduler sends into a step and which tokens
come out of it. vLLM's own statistics stay off, as they would be paid per step.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.record import Skip, on_gpu
from benchmarks.harness.timing import spread
from benchmarks.harness.workload import Item, grade, simulated
from vllm_d2f.d2f import D2FParams


def start_llm(model: str, **options: Any) -> Any:
    """Start `vllm.LLM` for measurements. `options` override what is set here.

    On a CPU these are float32 and a small cache. The prefix cache is off, because the same prompts
    are asked several times and must be computed each time.
    """
    from vllm import LLM

    from vllm_d2f import register

    register()
    defaults: dict[str, Any] = dict(enable_prefix_caching=False, disable_log_stats=True, seed=0)
    if not on_gpu():
        defaults |= dict(dtype="float32", kv_cache_memory_bytes=1 << 28)
    return LLM(model=model, **(defaults | options))


def start_engine(model: str, *, window: int, max_model_len: int, **options: Any) -> Any:
    """Start `vllm.LLM` to compare with the reference: float32, eager, token ids in and out."""
    # On a GPU Triton's attention otherwise multiplies float32 with 10 bits of mantissa (TF32), and
    # one of the authors' 16 golden runs then decodes other tokens.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    section = {"block_size": 4, "max_blocks": 1, "window": window}
    defaults: dict[str, Any] = dict(
        dtype="float32", enforce_eager=True, max_num_seqs=64, kv_cache_memory_bytes=1 << 28,
        block_size=32, skip_tokenizer_init=True, additional_config={"d2f": section},
    )  # fmt: skip
    return start_llm(model, max_model_len=max_model_len, **(defaults | options))


def greedy(max_tokens: int, params: Any = None, **more: Any) -> Any:
    """Return greedy sampling parameters with D2F settings: `params`, or a dictionary of some."""
    from vllm import SamplingParams

    given = asdict(params) if isinstance(params, D2FParams) else params
    extra = {f"d2f_{name}": value for name, value in given.items()} if given else None
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args=extra, **more)


def core_of(llm: Any) -> Any:
    """Return the engine core, where it runs in this process."""
    return getattr(llm.llm_engine.engine_core, "engine_core", None)


def runner_of(llm: Any) -> Any:
    """Return the model runner of an engine of this process."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner


def preemptions(llm: Any) -> int | None:
    """Return the preemptions so far, where the engine runs in this process."""
    core = core_of(llm)
    return None if core is None else core.scheduler.num_preempted


def shut_down(llm: Any) -> None:
    """Free the engine's memory before the next one starts."""
    llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request, and its cost."""

    item: int
    final: bool
    exact: bool
    useful: int  # tokens up to and including the end token
    raw: int  # decoded tokens, including those behind the end token
    forwards: int  # those the request took part in
    computed: int  # tokens run through the model after the prompt, all forwards together
    prompt: int
    first_s: float  # from handing in the batch to the request's first tokens
    last_s: float  # the same to its last ones
    text: str = ""
    ended: bool = True  # by itself

    @property
    def complete(self) -> str:
        """The text as it is scored: nothing where it was cut off."""
        return self.text if self.ended else ""


@dataclass(frozen=True, slots=True)
class StepCost:
    """One engine step."""

    requests: int
    new: int  # of them, those that enter with their prompt
    tokens: int  # prompts included
    context: int  # cached tokens that the others attend to
    ms: float  # wall time since the step before, everything that happened between included
    cpu_ms: float = 0.0  # the same, CPU time of this process


@dataclass(frozen=True, slots=True)
class Batch:
    """One `LLM.generate` call (or one vanilla loop)."""

    seconds: float
    cpu_s: float
    steps: int
    answers: tuple[Answer, ...]
    peak_mib: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Batch":
        """Make a batch of what a record holds."""
        return cls(**{**values, "answers": tuple(Answer(**a) for a in values["answers"])})


Done = Sequence[Sequence[Batch]]
"""The runs of one key."""


def answers(runs: Done) -> list[Answer]:
    """Return every answer of all runs."""
    return [answer for run in runs for batch in run for answer in batch.answers]


def rate(run: Sequence[Batch], field: str = "useful", per: str = "seconds") -> float:
    """Return the tokens of a run per second of `per` ("seconds" or "cpu_s")."""
    tokens = sum(getattr(answer, field) for answer in answers([run]))
    return tokens / max(total(run, per), 1e-9)


def paired(mine: Done, other: Done) -> dict[str, float]:
    """Return the ratio of useful tokens per second to those of `other`, run by run."""
    return spread(rate(a) / rate(b) for a, b in zip(mine, other, strict=True))


def total(run: Sequence[Batch], field: str) -> float:
    """Return the sum of a field, such as seconds or steps, over all batches of a run."""
    return sum(getattr(batch, field) for batch in run)


@dataclass
class Clock:
    """The times at which tokens left the engine, and the size of each step."""

    began: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    steps: list[StepCost] = field(default_factory=list)
    _at: float = 0.0
    _cpu_at: float = 0.0

    def attach(self, llm: Any) -> "Clock":
        """Listen to an engine of this process."""
        client, scheduler = llm.llm_engine.engine_core, core_of(llm).scheduler
        update, get_output = scheduler.update_from_output, client.get_output

        def timed_update(done: Any, *args: Any, **kwargs: Any) -> Any:
            # Once for each step, in their order. With asynchronous scheduling the next one has been
            # scheduled by then, and `get_output` may have returned without a step.
            found = update(done, *args, **kwargs)
            now, cpu = time.perf_counter(), time.process_time()
            if tokens := done.total_num_scheduled_tokens:
                context = sum(done.scheduled_cached_reqs.num_computed_tokens)
                requests, new = len(done.num_scheduled_tokens), len(done.scheduled_new_reqs)
                spent = (1e3 * (now - self._at), 1e3 * (cpu - self._cpu_at))
                self.steps.append(StepCost(requests, new, tokens, context, *spent))
            self._at, self._cpu_at = now, cpu
            return found

        def timed_get_output() -> Any:
            outputs = get_output()
            now = time.perf_counter()
            for output in outputs.outputs:
                if output.new_token_ids:
                    self.first.setdefault(output.request_id, now)
                    self.last[output.request_id] = now
            return outputs

        scheduler.update_from_output, client.get_output = timed_update, timed_get_output
        return self

    def start(self) -> None:
        self.first.clear()
        self.last.clear()
        self.steps.clear()
        self.began = self._at = time.perf_counter()
        self._cpu_at = time.process_time()

    def stop(self) -> float:
        """Return the seconds since `start`. The last step includes the time behind it."""
        now, cpu = time.perf_counter(), time.process_time()
        last = self.steps[-1]
        ms, cpu_ms = last.ms + 1e3 * (now - self._at), last.cpu_ms + 1e3 * (cpu - self._cpu_at)
        self.steps[-1] = replace(last, ms=ms, cpu_ms=cpu_ms)
        return now - self.began


class Engine:
    """vLLM with one model, asked in batches. D2F models and plain ones alike."""

    def __init__(
        self, model: str, *, mode: str, max_batch: int, max_tokens: int, options: dict[str, Any]
    ) -> None:
        settings = dict(max_num_seqs=max_batch, use_tqdm_on_load=False)
        self.llm = start_llm(model, **(dict(settings, enforce_eager=mode == "eager") | options))
        # None, or the tokens per forward that are accepted whatever the model says.
        self.simulated = simulated(self.llm.llm_engine.model_config.hf_config)
        # With random weights or simulated acceptance an end token may come anywhere, so answers
        # are decoded to their last token.
        endless = self.simulated is not None or options.get("load_format") == "dummy"
        self.sampling = greedy(max_tokens, ignore_eos=endless)
        self.clock = Clock().attach(self.llm)

    def measure(self, items: Sequence[Item], batch_size: int, offset: int = 0) -> list[Batch]:
        """Answer the items in batches of `batch_size`, one `LLM.generate` call each."""
        starts = range(0, len(items), batch_size)
        return [self._batch(items[at : at + batch_size], offset + at) for at in starts]

    def steps(self, items: Sequence[Item], batch_size: int) -> list[StepCost]:
        """Return the cost of every step of `measure`."""
        costs: list[StepCost] = []
        for at in range(0, len(items), batch_size):
            self._batch(items[at : at + batch_size], at)
            costs += self.clock.steps
        return costs

    def _batch(self, items: Sequence[Item], offset: int) -> Batch:
        reset_peak()
        self.clock.start()
        cpu = time.process_time()
        sampling = [self._sampling(item) for item in items]
        outputs = self.llm.generate([i.question for i in items], sampling, use_tqdm=False)
        return self._collect(items, outputs, offset, self.clock.stop(), time.process_time() - cpu)

    def arrive(self, items: Sequence[Item], at_s: Sequence[float]) -> list[Batch]:
        """Answer items that come in one by one, `at_s` seconds after the first.

        The times of an answer count from the moment at which its request came in.
        """
        reset_peak()
        self.clock.start()
        cpu = time.process_time()
        engine, outputs = self.llm.llm_engine, dict[int, Any]()
        coming = 0
        while len(outputs) < len(items):
            late = [t for t in at_s[coming:] if t <= time.perf_counter() - self.clock.began]
            for _ in late:
                item = items[coming]
                engine.add_request(str(coming), item.question, self._sampling(item))
                coming += 1
            if engine.has_unfinished_requests():
                outputs |= {int(one.request_id): one for one in engine.step() if one.finished}
            else:
                left = self.clock.began + at_s[coming] - time.perf_counter()
                time.sleep(max(0.0, left))
        seconds, cpu_s = self.clock.stop(), time.process_time() - cpu
        ordered = [outputs[index] for index in range(len(items))]
        return [self._collect(items, ordered, 0, seconds, cpu_s, at_s)]

    def _sampling(self, item: Item) -> Any:
        """Return the engine's own sampling, under the schema of an item that has one."""
        if item.schema is None:
            return self.sampling
        from vllm.sampling_params import StructuredOutputsParams

        own = self.sampling.clone()
        own.structured_outputs = StructuredOutputsParams(json=dict(item.schema))
        return own

    def _collect(
        self,
        items: Sequence[Item],
        outputs: Sequence[Any],
        offset: int,
        seconds: float,
        cpu_s: float,
        at_s: Sequence[float] | None = None,
    ) -> Batch:
        # vLLM numbers the requests of a call; a suffix makes an id unique.
        ids = sorted(self.clock.last, key=lambda name: int(name.split("-")[0]))
        came = [self.clock.began + t for t in at_s or [0.0] * len(items)]
        answers = tuple(
            self._answer(
                item,
                offset + at,
                output,
                self.clock.first[key] - begin,
                self.clock.last[key] - begin,
            )
            for at, (item, output, key, begin) in enumerate(
                zip(items, outputs, ids, came, strict=True)
            )
        )
        return Batch(seconds, cpu_s, len(self.clock.steps), answers, peak_mib())

    def _answer(self, item: Item, index: int, output: Any, first_s: float, last_s: float) -> Answer:
        from vllm_d2f.metrics import denoising_forwards

        completion = output.outputs[0]
        tokens = len(completion.token_ids)
        counters = completion.spec_decode_metrics
        ended = completion.finish_reason == "stop"
        graded = grade(item, completion.text, ended)
        return Answer(
            item=index, final=graded.final, exact=graded.exact, useful=tokens, raw=tokens,
            forwards=tokens if counters is None else denoising_forwards(completion),
            computed=tokens if counters is None else counters.num_draft_tokens,
            prompt=len(output.prompt_token_ids),
            first_s=first_s, last_s=last_s, text=completion.text, ended=ended,
        )  # fmt: skip


def reset_peak() -> None:
    """Reset the peak of this process's memory, where the kernel can."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the peak of resident memory since `reset_peak`, or of a device's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# Dummy weights: what a step costs, whatever is decoded.

BLOCK, MAX_BLOCKS = 32, 8
LASTING_WINDOWS = {"tau_add": 0.0, "tau_act": 1.0}
"""Settings that open a block in every forward and fully activate none but the first. Each fully
activated block decodes one position per forward, whatever is simulated."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest requests and batches that an engine is started for."""

    requests: int = 256  # at once
    step_tokens: int = 256 * 4 * BLOCK
    length: int = 3072  # of a request, prompt and answer


SMALL = Limits(requests=8, step_tokens=8 * 4 * BLOCK, length=512)
"""Limits of a rehearsal."""


class DummyEngine:
    """vLLM with a config of a real model's shape and dummy weights.

    A D2F model decodes with simulated acceptance: so many positions per forward whatever the model
    says, a number that is set before each measurement. Prompts are random token ids.
    """

    def __init__(
        self,
        folder: Path,
        *,
        diffusion: bool,
        limits: Limits,
        small: bool,
        gpu_memory_utilization: float = 0.92,
        **changes: Any,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self.diffusion, self.limits = diffusion, limits
        given: dict[str, Any] = dict(
            load_format="dummy", skip_tokenizer_init=True, use_tqdm_on_load=False,
            dtype="float32" if small else "bfloat16",
            max_model_len=limits.length, max_num_seqs=limits.requests,
            # A step holds a whole prompt beside full windows. Without room for both, the last
            # requests would wait until others end.
            max_num_batched_tokens=limits.step_tokens + limits.length,
        )  # fmt: skip
        if small:
            given |= dict(enforce_eager=True, kv_cache_memory_bytes=1 << 27)
        else:
            given["gpu_memory_utilization"] = gpu_memory_utilization
        if diffusion:
            # Each request says how many blocks it opens; a rate makes vLLM simulate.
            section = {"block_size": BLOCK, "max_blocks": 4, "window": BLOCK * MAX_BLOCKS}
            given["additional_config"] = {"d2f": section | {"simulate_tokens_per_forward": 1.0}}
        began = time.monotonic()
        self.llm = start_llm(str(folder), **(given | changes))
        self.start_s = time.monotonic() - began
        self.runner = runner_of(self.llm)
        self.clock = Clock().attach(self.llm)
        self.vocabulary = 500  # ids that every shape has, a small one too

    @property
    def cache_tokens(self) -> int:
        """Positions that the KV cache holds."""
        config: Any = self.llm.llm_engine.vllm_config.cache_config
        return int(config.num_gpu_blocks) * int(config.block_size)

    def simulate(self, tokens_per_forward: float) -> None:
        """Accept so many positions per forward and request from now on."""
        if not self.diffusion:
            return
        if not hasattr(self.runner.sampler.proposals, "simulate"):
            raise RuntimeError("Proposals has no `simulate` any more; change DummyEngine.simulate")
        self.runner.sampler.proposals.simulate = tokens_per_forward

    def prompts(self, requests: int, length: int) -> list[Any]:
        """Return token ids, different for every request."""
        return [
            {"prompt_token_ids": [(17 * r + 7 * i) % self.vocabulary for i in range(length)]}
            for r in range(requests)
        ]

    def sampling(self, max_tokens: int, blocks: int | None = None) -> Any:
        """Return greedy sampling to the last token; with `blocks`, windows of so many that last."""
        how = {"max_blocks": blocks} | LASTING_WINDOWS if self.diffusion and blocks else None
        return greedy(max_tokens, how, ignore_eos=True, detokenize=False)

    def fit(self, requests: int, length: int, width: int) -> None:
        """Skip a point whose requests do not all fit into one step."""
        limits = self.limits
        for asked, room, what in (
            (requests, limits.requests, "requests"),
            (requests * width, limits.step_tokens, "tokens in a step"),
            (length, limits.length, "positions of a request"),
            (requests * length, self.cache_tokens, "cached positions"),
        ):
            if asked > room:
                raise Skip(f"{asked} {what}, the engine has room for {room}")

    @contextmanager
    def running(
        self, requests: int, prompt: int, blocks: int, answer: int
    ) -> Iterator[Callable[[], Any]]:
        """Start requests and yield a function that runs one step. They are aborted at the end."""
        engine = self.llm.llm_engine
        names = [f"run-{requests}-{i}" for i in range(requests)]
        sampling = self.sampling(answer, blocks)
        for name, given in zip(names, self.prompts(requests, prompt), strict=True):
            engine.add_request(name, given, sampling)
        try:
            yield engine.step
        finally:
            engine.abort_request(names)
            while engine.has_unfinished_requests():
                engine.step()
