# SPDX-License-Identifier: Apache-2.0
"""p11: refuse prompts that arrive in pieces for D2F models."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Patch, check_sources, replace

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

NAME = "p11_streamed_input"
TARGET = "vllm.v1.engine.async_llm:AsyncLLM._add_streaming_input_request"


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    async def _add_streaming_input_request(
        self: AsyncLLM,
        request_id: str,
        input_stream: AsyncGenerator[Any, None],
        sampling_params: Any,
        arrival_time: float | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
    ) -> Any:
        from vllm_d2f.settings import is_d2f

        if is_d2f(self.model_config):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                "a prompt in pieces (an async generator) is not supported for D2F models: what "
                "was answered to the first piece would become part of the prompt of the next. "
                "Send the whole prompt at once",
                parameter="prompt",
            )
        return await original(
            self,
            request_id,
            input_stream,
            sampling_params,
            arrival_time,
            lora_request,
            tokenization_kwargs,
            trace_headers,
            priority,
            data_parallel_rank,
            session_id,
            kv_hints,
        )

    return _add_streaming_input_request


def install() -> None:
    """Install the patch; a second call does nothing. `D2FStatLogger` of a D2F model calls it."""
    check_sources(NAME, PATCH.source_sha256)
    replace(NAME, TARGET, _make)


def apply() -> None:
    """Nothing yet: every `AsyncLLM` makes the stat loggers of plugins, and its module is slow."""


def needed() -> bool:
    """Always: vLLM takes such prompts for every model that generates text."""
    return True


PATCH = Patch(
    name=NAME,
    target=(TARGET,),
    why="`AsyncLLM.generate` takes an async generator as a prompt and appends each piece to a "
    "running session. A D2F request's window lives in the worker until the request ends, and a "
    "session never ends between two pieces: the next answer would begin in the old window.",
    how="Wraps the method that starts such a session: for a D2F model it raises vLLM's validation "
    "error before anything is sent to the engine. Other models go to the original.",
    upstream="vLLM refuses it for pooling models, n > 1 and stop strings in the same place",
    remove_when="vLLM refuses streamed input for diffusion models, or D2F windows can be reopened",
    when="always, where a D2F model has an `AsyncLLM`",
    source_sha256={TARGET: "0c7d0fd89495b10cffaadc58fd1cff71a2ce5aa0e80e87436f0536357fd80f04"},
    apply=apply,
    needed=needed,
    checked_late=True,
)
