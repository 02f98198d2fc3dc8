# SPDX-License-Identifier: Apache-2.0
"""p08: D2F options beside a request's other fields; what is wrong with a stream is a status."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Patch, check_sources, replace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

NAME = "p08_request_fields"
COMPLETION = "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params"
CHAT = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params"
RESPONSES = "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params"

_served: VllmConfig | None = None
"""Of the server in this process."""


def _make(original: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    def to_sampling_params(
        self: Any, max_tokens: int, default_sampling_params: dict[str, Any] | None = None
    ) -> SamplingParams:
        return _with_fields(self, original(self, max_tokens, default_sampling_params))

    return to_sampling_params


def _make_responses(original: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    def to_sampling_params(
        self: Any, default_max_tokens: int, default_sampling_params: dict[str, Any] | None = None
    ) -> SamplingParams:
        return _with_fields(self, original(self, default_max_tokens, default_sampling_params))

    return to_sampling_params


def _with_fields(request: Any, params: SamplingParams) -> SamplingParams:
    from vllm_d2f.request_fields import add_request_fields

    add_request_fields(params, request.model_extra or {})
    if request.stream and _served is not None:
        _verify(params, _served)
    return params


def _verify(params: SamplingParams, config: VllmConfig) -> None:
    """What vLLM asks of parameters when the engine gets them, asked before a stream begins."""
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    # A deep copy: vLLM's check writes into what it has seen, and sees the parameters once more.
    copy.deepcopy(params).verify(
        config.model_config,
        None,
        config.structured_outputs_config,
        cached_tokenizer_from_config(config.model_config),
    )


def install(served: VllmConfig) -> None:
    """Install the patch; a second call only says what is served now. `D2FStatLogger` calls it."""
    global _served
    _served = served
    check_sources(NAME, PATCH.source_sha256)
    replace(NAME, COMPLETION, _make)
    replace(NAME, CHAT, _make)
    replace(NAME, RESPONSES, _make_responses)


def apply() -> None:
    """Nothing yet: only the server's process has requests, and their modules are slow to import."""


def needed() -> bool:
    """Always: vLLM takes fields that it does not know, and does nothing with them."""
    return True


PATCH = Patch(
    name=NAME,
    target=(COMPLETION, CHAT, RESPONSES),
    why="vLLM ignores fields that it does not know. A `d2f_preset` beside `max_tokens`, where "
    "everybody puts it first, would do nothing without a word, and so would `guided_json` and its "
    "like, which vLLM removed: the answer would come without the constraint. And it checks the "
    "parameters of a stream after it has answered HTTP 200: the error comes as an event.",
    how="Wraps the methods that make sampling parameters of a request: a `d2f_*` field is taken as "
    "if it stood in `vllm_xargs`, a removed one is an error that names its successor. Parameters "
    "of a stream are checked there too, by vLLM's own method. All other fields go vLLM's way.",
    upstream="vLLM logs a warning for the removed fields, once",
    remove_when="vLLM lets a plugin declare fields of requests, refuses those it removed, and "
    "checks parameters before it begins a stream",
    when="always, in servers of a D2F model",
    source_sha256={
        COMPLETION: "b846652987d728d72790b03d1e351e00608a59fc5b48238be0e6c0cc877652c6",
        CHAT: "4b72575d8302d5740225bd858b7616d5830d7f23e004289d4d8074bde319ebdd",
        RESPONSES: "66bf1733912693f2d562a3837e4cf1f7ac5ef6b5bc759127db1393b7ba549ab1",
    },
    apply=apply,
    needed=needed,
    checked_late=True,
)
