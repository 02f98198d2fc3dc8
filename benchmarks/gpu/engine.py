# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine with dummy weights in this process, for the stages that time steps.

A D2F model decodes with simulated acceptance: so many positions per forward whatever the model
says, a number that is set before each measurement. Prompts are random token ids.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import shapes
from benchmarks.gpu.stage import Options

BLOCK, MAX_BLOCKS = 32, 8


LASTING_WINDOWS = {"d2f_tau_add": 0.0, "d2f_tau_act": 1.0}
"""A block is opened in every forward, and none but the first is fully active: each that is decides
a position per forward, whatever is simulated.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine is started for.

    Attributes:
        requests: most of them at once.
        step_tokens: most tokens of a step.
        length: longest request, prompt and answer.
    """

    requests: int = 256
    step_tokens: int = 256 * 4 * BLOCK
    length: int = 3072


SMALL = Limits(requests=8, step_tokens=8 * 4 * BLOCK, length=512)


class DummyEngine:
    """vLLM with one of `shapes.SHAPES`."""

    def __init__(self, name: str, options: Options, **changes: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        from benchmarks.engine import Clock
        from vllm_d2f import register

        register()
        small = options.rehearse
        self.name, self.limits = name, SMALL if small else Limits()
        self.diffusion = name in shapes.D2F
        given: dict[str, Any] = dict(
            dtype="float32" if small else "bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=self.limits.length,
            max_num_seqs=self.limits.requests,
            # A prompt goes whole and beside windows that are full: without room for both the last
            # requests would wait until others end.
            max_num_batched_tokens=self.limits.step_tokens + self.limits.length,
            enable_prefix_caching=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
        )
        if small:
            given |= dict(enforce_eager=True, kv_cache_memory_bytes=1 << 27)
        else:
            given["gpu_memory_utilization"] = 0.92
        if self.diffusion:
            section: dict[str, Any] = {
                "block_size": BLOCK,
                "max_blocks": 4,
                "window": BLOCK * MAX_BLOCKS,
            }
            # Each request says how many blocks it opens; a rate makes vLLM simulate.
            section |= {"simulate_tokens_per_forward": 1.0}
            given["additional_config"] = {"d2f": section}
        folder = shapes.write(options.work / "shapes", name, small)
        began = time.monotonic()
        self.llm = LLM(model=str(folder), **(given | changes))
        self.start_s = time.monotonic() - began
        client: Any = self.llm.llm_engine.engine_core
        self.core = client.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.clock = Clock().attach(self.llm)
        self.vocabulary = 500  # ids that every shape has, a small one too

    @property
    def cache_tokens(self) -> int:
        """Positions that the KV cache holds."""
        config: Any = self.llm.llm_engine.vllm_config.cache_config
        return int(config.num_gpu_blocks) * int(config.block_size)

    @property
    def graphs(self) -> str:
        """What of a step vLLM captures."""
        return str(self.llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)

    def simulate(self, tokens_per_forward: float) -> None:
        """Accept so many positions per forward and request from now on."""
        if not hasattr(self.runner.sampler, "simulate"):
            raise RuntimeError("D2FSampler.simulate is gone: how is acceptance simulated now?")
        self.runner.sampler.proposals.simulate = tokens_per_forward

    def prompts(self, requests: int, length: int) -> list[Any]:
        """Token ids, different for every request."""
        return [
            {"prompt_token_ids": [(17 * r + 7 * i) % self.vocabulary for i in range(length)]}
            for r in range(requests)
        ]

    def sampling(self, max_tokens: int, blocks: int | None = None) -> Any:
        """Greedy, to the last token. With `blocks`, windows of so many that last."""
        from vllm import SamplingParams

        extra = {"d2f_max_blocks": blocks} | LASTING_WINDOWS if self.diffusion and blocks else None
        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )

    def fits(self, requests: int, length: int, tokens: int) -> str | None:
        """Why so many requests cannot be in one step; None if they can."""
        if requests > self.limits.requests:
            return f"the engine was started for {self.limits.requests} requests"
        if tokens > self.limits.step_tokens:
            return (
                f"{tokens} tokens in a step, the engine was started for {self.limits.step_tokens}"
            )
        if length > self.limits.length:
            return f"{length} positions, the engine was started for {self.limits.length}"
        if requests * length > self.cache_tokens:
            return f"{requests} x {length} positions, the cache holds {self.cache_tokens}"
        return None

    @contextmanager
    def running(
        self, requests: int, prompt: int, blocks: int, answer: int
    ) -> Iterator[Callable[[], Any]]:
        """Requests that are under way; gives what runs one step. Aborted at the end."""
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


class Waited:
    """Time that this process spends waiting for the device, until `stop`.

    Wraps the calls in which the host waits for CUDA. Copies that wait by themselves are not seen:
    what they take counts as the host's time. `benchmarks.gpu.profiling` sees them.
    """

    def __init__(self) -> None:
        import torch

        self.seconds = 0.0
        self._undo: list[tuple[Any, str, Any]] = []
        if not torch.cuda.is_available():
            return
        for owner, name in (
            (torch.cuda.Event, "synchronize"),
            (torch.cuda.Stream, "synchronize"),
            (torch.cuda, "synchronize"),
        ):
            self._wrap(owner, name)

    def _wrap(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        self._undo.append((owner, name, inner))
        setattr(owner, name, timed)

    def take(self) -> float:
        """Milliseconds since the last call."""
        ms, self.seconds = 1e3 * self.seconds, 0.0
        return ms

    def stop(self) -> None:
        for owner, name, inner in self._undo:
            setattr(owner, name, inner)
        self._undo.clear()
