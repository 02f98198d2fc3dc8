# SPDX-License-Identifier: Apache-2.0
"""What a step of this engine costs by its positions, measured before the first request.

The steps are real ones, of 1, 2, 4, ... requests whose windows grow. What was measured is kept on
the disk by model, machine and version, so the next start takes it from there. The scheduler
corrects it with the steps that it serves, so it need not be exact.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.version import __version__ as vllm_version

from vllm_d2f.hub.cache import root
from vllm_d2f.worker.warmup import PROMPT, DummyRequest, admit, go_on, let_go

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

SECONDS = 5.0
"""No more requests are tried once the measurement has taken this long."""

STEPS = 6
"""Steps of each number of requests; the windows of the later ones have several blocks."""

Execute = Callable[[SchedulerOutput], Any]


def measured(
    vllm_config: "VllmConfig", runner: Any, execute_model: Execute, sample_tokens: Any
) -> dict[int, float]:
    """Return positions -> seconds, from the disk or newly measured; every rank takes part."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    about = {
        "model": str(model.model),
        "dtype": str(model.dtype),
        "device": _device(runner.device),
        "threads": torch.get_num_threads(),
        "vllm": vllm_version,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "max_num_seqs": runner.max_num_reqs,
        "block_size": runner.model_state.settings.params.block_size,
        "eager": model.enforce_eager,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = root() / "step_seconds" / f"{name}.json"
    alone = parallel.tensor_parallel_size == 1  # ranks must agree on whether they measure
    if alone and path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["seconds"]
            return {int(positions): float(seconds) for positions, seconds in known.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s is damaged and is measured again", path)
    seconds = measure(runner, execute_model, sample_tokens)
    if alone and seconds:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".part-{os.getpid()}")
            part.write_text(json.dumps({**about, "seconds": seconds}, indent=1), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            logger.warning("what steps cost is not kept for the next start: %s", error)
    return seconds


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.node()} {platform.processor() or platform.machine()} {os.cpu_count()}"


@torch.inference_mode()
def measure(runner: Any, execute_model: Execute, sample_tokens: Any) -> dict[int, float]:
    """Run steps and time them. The requests are greedy and gone at the end."""
    seconds: dict[int, float] = {}
    began, count = time.perf_counter(), 1
    while count <= runner.max_num_reqs and time.perf_counter() - began < SECONDS:
        requests = _requests(runner, count)
        if len(requests) < count:
            break
        _run(runner, execute_model, sample_tokens, requests, seconds)
        count *= 2
    return dict(sorted(seconds.items()))


def _run(
    runner: Any,
    execute_model: Execute,
    sample_tokens: Any,
    requests: list[DummyRequest],
    seconds: dict[int, float],
) -> None:
    """Time the steps of some requests, then finish the requests."""
    block_size = runner.model_state.settings.params.block_size
    tail = len(PROMPT) % block_size if runner.model_state.states.origin_zero else 0
    while not all(one.admitted for one in requests):
        output = _empty(runner)
        for one in requests:
            if not one.admitted:
                admit(runner, output, one, block_size - tail)
        execute_model(output)
        sample_tokens(None)
    for step in range(STEPS):
        output = _empty(runner)
        go_on(runner, output, requests)
        positions = output.total_num_scheduled_tokens
        if not positions:
            break
        _wait(runner)
        began = time.perf_counter()
        execute_model(output)
        sample_tokens(None)
        _wait(runner)
        took = time.perf_counter() - began
        if step:  # the first one may compile
            seconds[positions] = min(took, seconds.get(positions, took))
    let_go(runner, execute_model, requests)


def _requests(runner: Any, count: int) -> list[DummyRequest]:
    """Make as many requests of one kind as there are pages for. Page 0 is the null page."""
    settings = runner.model_state.settings
    length = min(len(PROMPT) + (STEPS + 2) * settings.window, runner.max_model_len)
    if length <= len(PROMPT) + settings.params.block_size:
        return []
    pages = [
        -(-length // group.kv_cache_spec.block_size)
        for group in runner.kv_cache_config.kv_cache_groups
    ]
    count = min(count, (runner.kv_cache_config.num_blocks - 1) // sum(pages))
    page, requests = 1, []
    for index in range(count):
        block_ids = []
        for number in pages:
            block_ids.append(list(range(page, page + number)))
            page += number
        params = SamplingParams(
            temperature=0.0, seed=0, ignore_eos=True, max_tokens=length - len(PROMPT)
        )
        requests.append(DummyRequest(f"_d2f_step_{index}_", params, tuple(block_ids)))
    return requests


def _empty(runner: Any) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.num_spec_tokens_to_schedule = runner.num_speculative_steps
    return output


def _wait(runner: Any) -> None:
    if runner.device.type != "cpu":
        torch.accelerator.synchronize()
