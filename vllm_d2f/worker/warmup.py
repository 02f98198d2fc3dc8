# SPDX-License-Identifier: Apache-2.0
"""Steps that a D2F engine on CUDA runs before its first request, so that its kernels are compiled.

They are steps as the scheduler makes them: a prompt alone, a prompt with its first block, both
beside windows, and windows only. One request is greedy, one is drawn with every limit, one is drawn
without, and one has a request sampler, so that all kernels of the sampler run.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

PROMPT = (1, 2, 3)
STEPS = 6

KINDS = (
    dict(temperature=0.0),
    dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=1),
    dict(temperature=0.9, seed=2),
    dict(temperature=0.0, logprobs=2, repetition_penalty=1.1, frequency_penalty=0.1),
)


@dataclass(slots=True)
class DummyRequest:
    req_id: str
    params: SamplingParams
    block_ids: tuple[list[int], ...]
    admitted: bool = False


@torch.inference_mode()
def warm_up(
    runner: Any,
    execute_model: Callable[[SchedulerOutput], Any],
    sample_tokens: Callable[[Any], Any],
) -> None:
    """Run the steps.

    Args:
        runner: vLLM's V2 model runner, with a `D2FModelState` and its KV cache.
        execute_model, sample_tokens: the worker's, as the engine calls them.
    """
    settings = runner.model_state.settings
    block_size = settings.params.block_size
    length = min(len(PROMPT) + settings.window, runner.max_model_len)
    requests = _requests(runner, length) if length > len(PROMPT) else []
    if not requests:
        return  # no room: the first request compiles what it needs
    zeroer = getattr(runner, "kv_block_zeroer", None)
    if zeroer is not None:
        zeroer.warmup(runner.kv_cache_config.num_blocks)
    # The first prompt goes alone, the others with their first blocks, the last one late.
    tail = len(PROMPT) % block_size if runner.model_state.states.origin_zero else 0
    first = min(block_size - tail, length - len(PROMPT))
    for step in range(STEPS):
        arriving = requests[:1] if step == 0 else requests[1:-1] if step == 1 else requests[-1:]
        output = SchedulerOutput.make_empty()
        output.num_spec_tokens_to_schedule = runner.num_speculative_steps
        go_on(runner, output, [one for one in requests if one.admitted])
        for request in arriving:
            if not request.admitted:
                admit(runner, output, request, 0 if step == 0 else first)
        if output.total_num_scheduled_tokens:
            execute_model(output)
            sample_tokens(None)
    let_go(runner, execute_model, requests)
    if runner.device.type != "cpu":
        torch.accelerator.synchronize()


def let_go(
    runner: Any, execute_model: Callable[[SchedulerOutput], Any], requests: list[DummyRequest]
) -> None:
    """Finish the requests, and clear what they left where padding is written (the null page)."""
    output = SchedulerOutput.make_empty()
    output.finished_req_ids = {one.req_id for one in requests if one.admitted}
    execute_model(output)
    zeroer = getattr(runner, "kv_block_zeroer", None)
    if zeroer is not None:
        zeroer.zero_block_ids([0])


def _requests(runner: Any, length: int) -> list[DummyRequest]:
    """Make requests of as many kinds as there are slots and pages for. Page 0 is the null page."""
    max_tokens = length - len(PROMPT)
    groups = runner.kv_cache_config.kv_cache_groups
    pages = [-(-length // group.kv_cache_spec.block_size) for group in groups]
    count = min(
        len(KINDS), runner.max_num_reqs, (runner.kv_cache_config.num_blocks - 1) // sum(pages)
    )
    free, requests = itertools.count(1), []
    for index, kind in enumerate(KINDS[:count]):
        block_ids = tuple(list(itertools.islice(free, number)) for number in pages)
        params = SamplingParams(max_tokens=max_tokens, **kind)  # type: ignore[arg-type]
        requests.append(DummyRequest(f"_d2f_warm_up_{index}_", params, block_ids))
    return requests


def admit(runner: Any, output: SchedulerOutput, request: DummyRequest, width: int) -> None:
    """Schedule a request's prompt and `width` positions of its window."""
    tokens = len(PROMPT) + width
    if output.total_num_scheduled_tokens + tokens > runner.max_num_tokens:
        return
    request.admitted = True
    output.scheduled_new_reqs.append(
        NewRequestData(
            req_id=request.req_id,
            prompt_token_ids=list(PROMPT),
            mm_features=[],
            sampling_params=request.params,
            pooling_params=None,
            block_ids=request.block_ids,
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=list(PROMPT),
        )
    )
    _schedule(output, request, tokens, width)


def go_on(runner: Any, output: SchedulerOutput, requests: list[DummyRequest]) -> None:
    """Schedule the window of each request that has one. Its place is read from the device."""
    window, cached = runner.model_state.states.window, CachedRequestData.make_empty()
    for request in requests:
        slot = runner.req_states.req_id_to_index[request.req_id]
        open_, lag = int(window.open_R[slot]), int(runner.sampler.lag_S[slot])
        tokens = open_ + lag
        # The query begins with the prompt's tail, if that is still in the window.
        tail = max(lag - int(window.start_R[slot]), 0)
        if not open_ or output.total_num_scheduled_tokens + tokens > runner.max_num_tokens:
            continue
        computed = int(runner.req_states.num_computed_tokens.gpu[slot])
        cached.req_ids.append(request.req_id)
        cached.num_computed_tokens.append(computed)
        cached.num_output_tokens.append(max(computed - len(PROMPT), 0))
        cached.new_block_ids.append(None)
        _schedule(output, request, tokens, tokens - tail)
    output.scheduled_cached_reqs = cached


def _schedule(output: SchedulerOutput, request: DummyRequest, tokens: int, width: int) -> None:
    output.num_scheduled_tokens[request.req_id] = tokens
    output.total_num_scheduled_tokens += tokens
    if width:
        output.scheduled_spec_decode_tokens[request.req_id] = [-1] * width
