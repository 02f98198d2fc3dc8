# SPDX-License-Identifier: Apache-2.0
"""Start-up: turn a checkpoint of a D2F family into a deployment, or refuse it with the remedy."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import vllm.envs as envs
from vllm.config import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_bytes, get_hf_file_to_dict
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_d2f.attention.selection import prepare as prepare_attention
from vllm_d2f.cpu import emulates
from vllm_d2f.engine_args import SCHEDULER, check_engine_args
from vllm_d2f.hub.checkpoint import check_tokenizer_files, check_weight_files
from vllm_d2f.models import FAMILIES, family_config
from vllm_d2f.settings import Settings, checkpoint_settings

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, SchedulerConfig, VllmConfig

logger = init_logger(__name__)

# Asynchronous scheduling hides the host's work behind the device's. It costs wider queries, and
# windows cannot adapt. On an H200 it made one request of a 7B shape 1.15 times as fast, eight at
# once 0.72 times. A CPU has no device to hide the work behind.
ASYNC_BY_DEFAULT = False


class D2FConfigHook(VerifyAndUpdateConfig):
    """vLLM's hook for an architecture; it runs when vLLM builds its configuration."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        model_config = vllm_config.model_config
        model_config.hf_config = family_config(model_config.hf_config)
        model_config.hf_text_config = model_config.hf_config
        _check_model_type(model_config)
        _check_code(model_config)
        settings = _resolve(vllm_config)
        check_engine_args(vllm_config, settings)
        check_weight_files(vllm_config)

        tokenizer = Path(str(model_config.tokenizer))
        if tokenizer.is_dir() and not model_config.skip_tokenizer_init:
            check_tokenizer_files(tokenizer)
        if model_config.trust_remote_code:
            logger.warning(
                "--trust-remote-code is switched off: D2F models need none. Config, tokenizer and "
                "model are classes of vllm-d2f and transformers; a checkpoint's code does not run."
            )
            model_config.trust_remote_code = False
        scheduler_config = vllm_config.scheduler_config
        scheduler_config.scheduler_cls = SCHEDULER
        _set_async(scheduler_config)
        settings = _without_adaptive_window(settings, scheduler_config)
        # vLLM treats a model with a canvas as a diffusion model; D2F's canvas is the widest query.
        canvas = widest_query(settings, scheduler_config)
        # vLLM hands the model's config to the engine and the workers, and these two with it.
        model_config.hf_config.d2f = settings.as_dict()
        model_config.hf_config.canvas_length = canvas
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=canvas)

        if current_platform.is_cuda():
            prepare_attention(vllm_config)
        if current_platform.is_cpu():
            _refuse_on_cpu(vllm_config)
            _bound_cpu_cache(vllm_config)
            _warn_of_slow_dtype(model_config)
        _set_prefill(settings, model_config.max_model_len, scheduler_config)

        # The published setting is greedy. A request and the user's own default come first.
        if "temperature" not in model_config.get_diff_sampling_param():
            model_config.override_generation_config.setdefault("temperature", 0.0)
        logger.info("D2F settings: %s", settings)
        if settings.simulate_tokens_per_forward is not None:
            logger.warning(
                "SIMULATED ACCEPTANCE: %s tokens per forward whatever the model says. Speeds are "
                "meaningful, the text and any score are not.",
                settings.simulate_tokens_per_forward,
            )


def register_hook() -> None:
    """Make vLLM call the hook for every D2F architecture."""
    for architecture in FAMILIES:
        MODELS_CONFIG_MAP[architecture] = D2FConfigHook


def widest_query(settings: Settings, scheduler_config: "SchedulerConfig") -> int:
    """Return the positions of a request's widest query without its prompt.

    With asynchronous scheduling a query holds a window and what the forward before it committed:
    at most another window.
    """
    return settings.window * (2 if scheduler_config.async_scheduling else 1)


def _set_async(scheduler_config: "SchedulerConfig") -> None:
    """Decide whether vLLM schedules a step while the one before it runs.

    Raises:
        ValueError: the user asked for it where it is not possible.
    """
    count_nans = envs.VLLM_RAISE_ON_LOGIT_NANS
    if scheduler_config.async_scheduling is None:
        scheduler_config.async_scheduling = ASYNC_BY_DEFAULT and not count_nans
    elif scheduler_config.async_scheduling and count_nans:
        raise ValueError(
            "--async-scheduling: VLLM_RAISE_ON_LOGIT_NANS needs the field that brings the widths "
            "of windows back; unset it, or give --no-async-scheduling"
        )


def _without_adaptive_window(settings: Settings, scheduler_config: "SchedulerConfig") -> Settings:
    """Return the settings without adaptive windows where scheduling is asynchronous.

    The scheduler then does not know a window in time to choose how much of it to compute.

    Raises:
        ValueError: the user asked for both.
    """
    if not scheduler_config.async_scheduling:
        return settings
    if settings.adaptive_window:
        raise ValueError(
            "d2f.adaptive_window needs synchronous scheduling; remove --async-scheduling, or set "
            "adaptive_window to false"
        )
    return replace(settings, adaptive_window=None)


def _set_prefill(
    settings: Settings, max_model_len: int, scheduler_config: "SchedulerConfig"
) -> None:
    """Prefill a prompt in one step, unless it may be cut between its attention blocks."""
    budget = scheduler_config.max_num_batched_tokens
    if settings.prompt_attention == "block_causal":
        least = min(widest_query(settings, scheduler_config), max_model_len)
        if budget < least:
            raise ValueError(
                f"--max-num-batched-tokens {budget} must be at least {least}: a step holds at "
                "least one request's widest query"
            )
        return
    scheduler_config.enable_chunked_prefill = False
    if budget < max_model_len:
        logger.info(
            "D2F prefills a prompt in one step: raising max_num_batched_tokens from %d to "
            "max_model_len = %d. Lower --max-model-len to save memory.",
            budget,
            max_model_len,
        )
        scheduler_config.max_num_batched_tokens = max_model_len


def _refuse_on_cpu(vllm_config: "VllmConfig") -> None:
    """Refuse options that need CUDA: vLLM's CPU platform drops them without a message."""
    backend = vllm_config.attention_config.backend
    mode = vllm_config.compilation_config.cudagraph_mode
    if backend not in (None, AttentionBackendEnum.CPU_ATTN):
        option = f"--attention-backend {backend.name}"
    elif mode not in (None, CUDAGraphMode.NONE):
        option = f"cudagraph_mode {mode.name} in --compilation-config"
    else:
        return
    raise ValueError(
        f"{option} needs CUDA, and this is vLLM for CPUs; remove it, or install the build for "
        "CUDA: pip install 'vllm-d2f[gpu]'"
    )


CPU_PAGE = 128  # vLLM's tokens per page on a CPU, unless the user says otherwise
LEAST_CPU_CACHE = 1 << 28  # bytes: room for the prompts of earlier requests


def _bound_cpu_cache(vllm_config: "VllmConfig") -> None:
    """Reserve no more of a CPU's memory than all requests at their longest can fill.

    vLLM takes 92 % of the memory for every model and refuses to start where less is free, even for
    a model of some megabytes. If the user gives an option about memory, this changes nothing.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    default = type(cache).gpu_memory_utilization
    given = cache.kv_cache_memory_bytes, cache.num_gpu_blocks_override, cache.gpu_memory_utilization
    if given != (None, None, default):
        return
    page = cache.block_size if cache.user_specified_block_size else CPU_PAGE
    numbers = 2 * model.get_num_layers(parallel)  # keys and values
    numbers *= model.get_num_kv_heads(parallel) * model.get_head_size()
    bytes_per_token = numbers * cast("torch.dtype", model.dtype).itemsize
    # One page more per request, because its last one is seldom full, and one request more for the
    # null page of vLLM.
    tokens = (-(-model.max_model_len // page) + 1) * page * (scheduler.max_num_seqs + 1)
    enough = max(tokens * bytes_per_token, LEAST_CPU_CACHE)
    if enough < default * current_platform.get_device_total_memory():
        logger.info(
            "Reserving %.2f GiB for the KV cache, enough for %d requests of %d tokens. "
            "--kv-cache-memory-bytes or --gpu-memory-utilization change that.",
            enough / (1 << 30),
            scheduler.max_num_seqs,
            model.max_model_len,
        )
        cache.kv_cache_memory_bytes = enough


def _warn_of_slow_dtype(model_config: "ModelConfig") -> None:
    """Name the faster data type where the processor has no instructions for the chosen one."""
    if emulates(dtype := cast("torch.dtype", model_config.dtype)):
        logger.warning(
            "This processor has no instructions for %s, so a window takes several times as long "
            "as in float32, and D2F may be slower than an autoregressive model. Give "
            "--dtype float32.",
            str(dtype).removeprefix("torch."),
        )


def _check_model_type(model_config: "ModelConfig") -> None:
    """Refuse a config of another class: nothing has checked its values."""
    config, architecture = model_config.hf_config, model_config.architecture
    if getattr(config, "family", None) is not FAMILIES[architecture]:
        known = (f"{name} with {family.model_type!r}" for name, family in FAMILIES.items())
        raise ValueError(
            f"{model_config.model}: config.json says architecture {architecture} with "
            f"model_type {config.model_type!r:.80}; D2F models have {' or '.join(known)}"
        )


def _check_code(model_config: "ModelConfig") -> None:
    """Refuse a checkpoint that has its family's layout and comes with another decoding loop.

    The checkpoint's code is searched as text and never run.
    """
    family = model_config.hf_config.family
    if not family.foreign_code:
        return
    code = get_hf_file_bytes(family.code_file, model_config.model, model_config.revision) or b""
    for word, reason in family.foreign_code.items():
        if word.encode() in code:
            raise ValueError(
                f"{model_config.model} cannot be served: {reason} ({family.code_file} in it has "
                f"{word!r})"
            )


def _resolve(vllm_config: "VllmConfig") -> Settings:
    """Merge the D2F settings of generation_config.json, config.json and the user, in this order."""
    model_config = vllm_config.model_config
    additional = vllm_config.additional_config
    given = additional.get("d2f") if isinstance(additional, dict) else None
    file = get_hf_file_to_dict("generation_config.json", model_config.model, model_config.revision)
    try:
        return checkpoint_settings(model_config.hf_config, file or {}, given)
    except ValueError as error:
        raise ValueError(f"{model_config.model}: {error}") from None
