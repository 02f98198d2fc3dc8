# SPDX-License-Identifier: Apache-2.0
"""p10: a server whose engine died ends with an exit status that says so."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, MutableSequence
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Patch, check_sources, replace

if TYPE_CHECKING:
    import socket
    from argparse import Namespace

    from vllm.engine.protocol import EngineClient

NAME = "p10_exit_status"
TARGET = "vllm.entrypoints.launchers.api_server.entry:build_and_serve"
HTTP = "vllm.entrypoints.launchers.launcher:serve_http"

MESSAGE = (
    "The engine died, see the first error above; the server ends with status 1 so that a "
    "supervisor starts it again."
)


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    async def build_and_serve(
        engine_client: EngineClient,
        listen_address: str,
        sock: socket.socket,
        args: Namespace,
        peer_loads: tuple[MutableSequence[int], int] | None = None,
        **uvicorn_kwargs: Any,
    ) -> Coroutine[Any, Any, None]:
        from vllm_d2f.settings import is_d2f

        closing = await original(
            engine_client, listen_address, sock, args, peer_loads, **uvicorn_kwargs
        )
        # After a signal vLLM stops the engine itself, and returns the coroutine that closes the
        # connections. This one it returns when the HTTP server ended on its own.
        ended_by_itself = getattr(closing, "__name__", "") == "dummy_shutdown"
        if ended_by_itself and engine_client.errored and is_d2f(engine_client.model_config):
            return _fail_after(closing)
        return closing

    return build_and_serve


async def _fail_after(closing: Coroutine[Any, Any, None]) -> None:
    await closing
    raise SystemExit(MESSAGE)


def install() -> None:
    """Install the patch; a second call does nothing. `D2FStatLogger` of a D2F model calls it."""
    check_sources(NAME, PATCH.source_sha256)
    replace(NAME, TARGET, _make)


def apply() -> None:
    """Nothing yet: only a server serves, and the module is slow to import."""


def needed() -> bool:
    """Always: vLLM's server ends with status 0 whatever ended it."""
    return True


PATCH = Patch(
    name=NAME,
    target=(TARGET,),
    why="When the engine dies (out of memory, a killed process, a CUDA error), vLLM's server "
    "answers with errors, stops, and exits with status 0. systemd's `Restart=on-failure`, "
    "Kubernetes' `OnFailure` and every script take that for success.",
    how="Wraps the function that serves until the end: where the HTTP server stopped by itself and "
    "the engine is dead, what vLLM awaits last raises `SystemExit` with a message, so the status "
    "is 1. A signal, and any other model, ends as before.",
    upstream="none yet: wanted is a non-zero exit after `EngineDeadError`",
    remove_when="`vllm serve` exits with another status than 0 when its engine has died",
    when="always, in servers of a D2F model",
    source_sha256={
        TARGET: "5b8b058238d9df87c07ffda0f51fa82273ad4226140c9d0de6f991a7ac8eab3d",
        HTTP: "f471b91743318731b51c325292f51b46167f798c86f1082b62bf045bc3886e0b",
    },
    apply=apply,
    needed=needed,
    checked_late=True,
)
