# SPDX-License-Identifier: Apache-2.0
"""D2F's options in the body of an HTTP request, by one rule for every endpoint of the server.

A `d2f_*` option may be given in `vllm_xargs` or beside the other fields. vLLM ignores fields that
an endpoint does not know, so `RequestFields` reads every request before the endpoint does: it
refuses unknown options, values out of range and fields that vLLM removed with HTTP 400, and keeps
the valid options for `admission.check_sampling_params`, which gives them to the engine. No endpoint
needs to know of them, and endpoints of later vLLM versions are covered too.
"""

import json
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_d2f.settings import Settings, request_params

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.sampling_params import SamplingParams

REMOVED_FIELDS = {
    "guided_json": 'structured_outputs {"json": ...} or response_format',
    "guided_regex": 'structured_outputs {"regex": ...}',
    "guided_choice": 'structured_outputs {"choice": [...]}',
    "guided_grammar": 'structured_outputs {"grammar": ...}',
    "guided_decoding_backend": "the server's --structured-outputs-config",
    "guided_whitespace_pattern": 'structured_outputs {"whitespace_pattern": ...}',
}
"""Request fields that vLLM removed and now ignores, with their successors."""

_requested: ContextVar[Mapping[str, Any] | None] = ContextVar("d2f_options", default=None)
"""The D2F options of the HTTP request that the current task serves."""


def refuse(parameter: str, message: str) -> NoReturn:
    """Raise vLLM's error for a bad request: HTTP 400, with the parameter's name."""
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(message, parameter=parameter)


def options_beside(fields: Mapping[str, Any], xargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `d2f_*` options among a request's fields; `xargs` are its `vllm_xargs`.

    Raises:
        VLLMValidationError: a field that vLLM removed, or an option given twice.
    """
    for name, successor in REMOVED_FIELDS.items():
        if fields.get(name) is not None:
            refuse(name, f"{name} is not supported any more; use {successor}.")
    options = {k: v for k, v in fields.items() if k.startswith("d2f_") and v is not None}
    for name in sorted(options.keys() & (xargs or {}).keys()):
        refuse(name, f"{name} stands in vllm_xargs and beside it; remove one of them.")
    return options


def add_request_fields(params: "SamplingParams", fields: Mapping[str, Any]) -> None:
    """Add the `d2f_*` options among a request's unknown fields to its sampling parameters.

    Commands such as `vllm run-batch` make sampling parameters of requests that no HTTP server has
    read (`patches/p08`). `options_beside` says what is refused.
    """
    _add(params, options_beside(fields, params.extra_args))


def add_http_options(params: "SamplingParams") -> None:
    """Add the options that `RequestFields` read, for endpoints that drop them on the way."""
    _add(params, _requested.get())


def _add(params: "SamplingParams", options: Mapping[str, Any] | None) -> None:
    if options:
        params.extra_args = {**(params.extra_args or {}), **options}


def check_default_greedy(request: Any, default_sampling_params: Mapping[str, Any] | None) -> None:
    """Explain that several answers need a temperature, where the model's default is greedy.

    Raises:
        VLLMValidationError: the request has `n` > 1 and leaves the temperature at a default of 0.
    """
    n = getattr(request, "n", None) or 1
    default = (default_sampling_params or {}).get("temperature")
    if n > 1 and default == 0 and request.temperature is None:
        refuse(
            "n",
            f"n must be 1 when using greedy sampling, got {n}. The default temperature of this "
            'model is 0, which is greedy; send "temperature" above 0 beside n, for example 0.7.',
        )


class RequestFields:
    """ASGI middleware that reads D2F's options before the endpoint reads the request."""

    def __init__(self, app: "ASGIApp", settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http" or not _is_json(scope):
            return await self.app(scope, receive, send)
        from vllm.exceptions import VLLMValidationError

        messages: list[Message] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        try:
            options = self.options(b"".join(message.get("body", b"") for message in messages))
        except (ValueError, VLLMValidationError) as error:  # vLLM's is no ValueError
            return await _refusal(error)(scope, receive, send)

        async def replay() -> "Message":
            return messages.pop(0) if messages else await receive()

        token = _requested.set(options)
        try:
            await self.app(scope, replay, send)
        finally:
            _requested.reset(token)

    def options(self, body: bytes) -> dict[str, Any]:
        """Return a request's D2F options, unless `options_beside` or `request_params` refuse."""
        try:
            fields = json.loads(body)
            json.dumps(fields, ensure_ascii=False).encode()
        except RecursionError:
            raise ValueError("the request's JSON is nested too deeply; send it flatter") from None
        except UnicodeEncodeError:
            half = "the request holds half of a character (a lone surrogate, such as \\ud83d)"
            raise ValueError(f"{half}; send the whole character") from None
        except ValueError:
            fields = None  # leave broken JSON to the endpoint
        if not isinstance(fields, dict):
            return {}
        # `/inference/v1/generate` takes sampling parameters as an object of their own.
        inner = fields.get("sampling_params")
        if isinstance(inner, dict):
            fields = {**fields, **inner}
        xargs = fields.get("vllm_xargs")
        xargs = xargs if isinstance(xargs, dict) else {}
        options = {**xargs, **options_beside(fields, xargs)}
        request_params(self.settings, options)
        return options


def _is_json(scope: "Scope") -> bool:
    """Return whether a body is JSON. vLLM also takes one without a content type for JSON."""
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return scope["method"] == "POST" and (not types or b"json" in types[0].lower())


def _refusal(error: Exception) -> "ASGIApp":
    """Return the response HTTP 400, in vLLM's form of errors."""
    from starlette.responses import JSONResponse
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMValidationError

    parameter = error.parameter if isinstance(error, VLLMValidationError) else "vllm_xargs"
    response = create_error_response(str(error), param=parameter)
    return JSONResponse(response.model_dump(), status_code=response.error.code)
