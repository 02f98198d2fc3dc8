# SPDX-License-Identifier: Apache-2.0
"""p10: a server whose engine has died exits with status 1."""

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, is_d2f, patch

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

TARGET = "vllm.entrypoints.launchers.api_server.entry:build_and_serve"
HTTP = "vllm.entrypoints.launchers.launcher:serve_http"


@patch(
    TARGET,
    apply="server",
    why="When the engine dies (out of memory, a killed process, a CUDA error), vLLM's server "
    "answers with errors, stops, and exits with status 0. systemd's `Restart=on-failure`, "
    "Kubernetes' `OnFailure` and every script take that for success.",
    how="The function that serves until the end hands back what vLLM awaits last. If the HTTP "
    "server has stopped by itself and the engine of a D2F model is dead, that raises `SystemExit` "
    "with a message, so the status is 1. After a signal, and for any other model, the server ends "
    "as before.",
    upstream="none yet: vLLM does not exit with an error after `EngineDeadError`",
    remove_when="`vllm serve` exits with another status than 0 when its engine has died",
    written_against={TARGET: "5b8b058238d9df87", HTTP: "f471b91743318731"},
)
async def p10_exit_status(
    original: Original, engine_client: "EngineClient", *args: Any, **kwargs: Any
) -> Coroutine[Any, Any, None]:
    closing = await original(engine_client, *args, **kwargs)
    # vLLM returns a coroutine of this name if the HTTP server has ended by itself. After a signal
    # it stops the engine itself and returns the coroutine that closes the connections.
    ended_by_itself = getattr(closing, "__name__", "") == "dummy_shutdown"
    if ended_by_itself and engine_client.errored and is_d2f(engine_client.model_config):
        return _fail_after(closing)
    return closing


async def _fail_after(closing: Coroutine[Any, Any, None]) -> None:
    await closing
    raise SystemExit(
        "The engine died, see the first error above; the server ends with status 1 so that a "
        "supervisor starts it again."
    )
