# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine arguments that D2F cannot honour: a start with one ends with its flag and remedy.

`tests/data/engine_args.json` has every field of vLLM's `AsyncEngineArgs` in one of three lists:
handled by D2F, refused here, left to vLLM. A test compares it with the installed vLLM, so that a
new argument gets its place.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_d2f.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

SCHEDULER = "vllm_d2f.scheduler.D2FScheduler"

_given: ContextVar["EngineArgs | None"] = ContextVar("engine_args", default=None)
"""The arguments as the user gave them, while vLLM builds its configuration of them."""


@contextmanager
def given(args: "EngineArgs") -> Iterator[None]:
    """Keep the arguments for `check_engine_args`: vLLM writes its defaults into them (`p14`)."""
    token = _given.set(copy.copy(args))
    try:
        yield
    finally:
        _given.reset(token)


def check_engine_args(vllm_config: "VllmConfig", settings: Settings) -> None:
    """Refuse options that D2F decoding cannot honour. vLLM has built the configuration of them.

    Raises:
        ValueError: names every such flag, each with the remedy.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler_config, cache = vllm_config.scheduler_config, vllm_config.cache_config
    bidirectional = settings.prompt_attention == "bidirectional"
    # Two windows with asynchronous scheduling.
    widest = model.max_model_len if bidirectional else min(2 * settings.window, model.max_model_len)
    tokens = scheduler_config.max_num_scheduled_tokens

    def asked(name: str) -> Any:
        return getattr(_given.get(), name, None)

    refused = {
        "--speculative-config: D2F already decodes several tokens per step; remove it": (
            vllm_config.speculative_config is not None
        ),
        "--diffusion-config: D2F's window takes its place; remove it, and set block_size and "
        "max_blocks in --additional-config '{\"d2f\": {...}}'": asked("diffusion_config"),
        "--enable-chunked-prefill: a bidirectional prompt is prefilled whole; remove it": (
            bidirectional and asked("enable_chunked_prefill")
        ),
        f"--max-num-scheduled-tokens {tokens} must be at least {widest}, the longest query of a "
        "request": tokens is not None and tokens < widest,
        "--pipeline-parallel-size must be 1: the window lives on one rank; use "
        "--tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "--prefill-context-parallel-size and --decode-context-parallel-size must be 1": (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1
        ),
        "--scheduler-cls: D2F brings its own; remove it": (
            scheduler_config.scheduler_cls not in (None, SCHEDULER)
        ),
        "--long-prefill-token-threshold must be 0: it would cut prompts and windows": (
            scheduler_config.long_prefill_token_threshold > 0
        ),
        "--long-prefill-token-threshold-adaptive: it would cut prompts and windows; remove it": (
            scheduler_config.long_prefill_token_threshold_adaptive
        ),
        "--enable-lora: an adapter is merged into its base instead; run `python -m vllm_d2f merge "
        f"--base {model.model} --adapter DIR --out FOLDER`, then `vllm serve FOLDER`": (
            vllm_config.lora_config is not None
        ),
        "--enable-prompt-embeds: a prompt is token ids; remove it": model.enable_prompt_embeds,
        "--runner pooling: D2F models generate text; remove it": model.runner_type != "generate",
    }
    unsupported = {
        "--enable-dbo": parallel.enable_dbo,
        "--logits-processors": model.logits_processors,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--kv-offloading-size": cache.kv_offloading_size is not None,
        "--ec-transfer-config": vllm_config.ec_transfer_config is not None,
        "--watermark-config": vllm_config.watermark_config is not None,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--use-fp64-gumbel": model.use_fp64_gumbel,
        "--enable-trace-replay": model.enable_trace_replay,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "--model-class-overrides": asked("model_class_overrides"),
    }
    refused |= {f"{flag}: not supported; remove it": hit for flag, hit in unsupported.items()}
    if messages := [message for message, hit in refused.items() if hit]:
        raise ValueError("vllm-d2f cannot serve with these options: " + "; ".join(messages))
