# SPDX-License-Identifier: Apache-2.0
"""p08: D2F's options in every request, wherever they are given; HTTP 400 for a bad stream."""

import copy
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, configs, patch

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.sampling_params import SamplingParams

COMPLETION = "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params"
CHAT = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params"
RESPONSES = "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params"
MIDDLEWARE = "vllm.entrypoints.launchers.app:init_entrypoints_middleware"


@patch(
    COMPLETION,
    CHAT,
    RESPONSES,
    apply="server",
    why="vLLM ignores fields that it does not know. A `d2f_preset` beside `max_tokens`, its most "
    "natural place, would have no effect, and neither would `guided_json` and the like, which vLLM "
    "removed: the answer would not obey the constraint. vLLM also checks the parameters of a "
    "stream only after it has answered HTTP 200, so that the error comes as an event. And "
    '"n must be 1 when using greedy sampling" does not say that greedy is the default of a model.',
    how="A middleware of the server reads the body of every request before its endpoint does: a "
    "`d2f_*` field counts as if it stood in `vllm_xargs`, a removed field is an error that names "
    "its successor. The methods that turn a request into sampling parameters do the same for "
    "requests without a server (`vllm run-batch`), and check the parameters of a stream with "
    "vLLM's own method. All other fields are left to vLLM.",
    upstream="vLLM logs a warning for the removed fields, once",
    remove_when="vLLM lets a plugin declare fields of requests, refuses those it removed, and "
    "checks parameters before it begins a stream",
    written_against={
        COMPLETION: "b846652987d728d7",
        CHAT: "4b72575d8302d574",
        RESPONSES: "66bf1733912693f2",
        MIDDLEWARE: "583c2958f2eb48d0",
    },
)
def p08_request_fields(
    original: Original, self: Any, *args: Any, **kwargs: Any
) -> "SamplingParams":
    from vllm_d2f.request_fields import add_request_fields, check_default_greedy

    check_default_greedy(self, args[1] if args[1:] else kwargs.get("default_sampling_params"))
    params = original(self, *args, **kwargs)
    add_request_fields(params, self.model_extra or {})
    served = configs.get("server")
    if self.stream and served is not None:
        from vllm.tokenizers.registry import cached_tokenizer_from_config

        # As the engine does when it gets the parameters, but before the stream begins. vLLM's check
        # writes into the parameters, and later runs once more on the originals.
        tokenizer = cached_tokenizer_from_config(served.model_config)
        copy.deepcopy(params).verify(
            served.model_config, None, served.structured_outputs_config, tokenizer
        )
    return params


@p08_request_fields.also(MIDDLEWARE)
def _middleware(original: Original, args: Any, app: "FastAPI", *rest: Any) -> None:
    from vllm_d2f.request_fields import RequestFields
    from vllm_d2f.settings import served_settings

    served = configs.get("server")
    if served is not None:
        # Added first it is the innermost: vLLM authenticates a request before this reads it.
        app.add_middleware(RequestFields, settings=served_settings(served.model_config))
    original(args, app, *rest)
