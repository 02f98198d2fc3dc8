# SPDX-License-Identifier: Apache-2.0
"""p10: what the server awaits last fails after the death of a D2F model's engine, and only then.

The exit status of a real server is tested in tests/reliability/test_server.py.
"""

import asyncio
import inspect
from types import SimpleNamespace

import pytest
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.launcher import serve_http
from vllm_d2f.patches.p10_exit_status import HTTP, TARGET
from vllm_d2f.patches.p10_exit_status import p10_exit_status as PATCH
from vllm_d2f.patches.patch import function_of, source_hash

D2F, OTHER = "DreamModel", "Qwen2ForCausalLM"


def client(architecture: str, errored: bool) -> SimpleNamespace:
    """Return what the patch reads of an engine's client."""
    return SimpleNamespace(
        errored=errored, model_config=SimpleNamespace(architectures=[architecture])
    )


def serve(engine: SimpleNamespace, how: str) -> list[str]:
    """Serve until the end with an `original` that hands back what vLLM's does."""
    done = []

    async def dummy_shutdown():
        done.append("by itself")

    async def shutdown():
        done.append("by a signal")

    async def original(engine_client, listen_address, sock, args, peer_loads=None, **more):
        assert (engine_client, listen_address, more) == (engine, "address", {"log_level": "info"})
        return {"by itself": dummy_shutdown, "by a signal": shutdown}[how]()

    async def run():
        await (await PATCH.wrap(TARGET, original)(engine, "address", None, None, log_level="info"))

    asyncio.run(run())
    return done


def test_it_was_written_against_this_vllm():
    for target, function in ((TARGET, entry.build_and_serve), (HTTP, serve_http)):
        assert source_hash(function) == PATCH.written_against[target], target


def test_a_dead_engine_is_a_failure():
    with pytest.raises(SystemExit, match="engine died") as end:
        serve(client(D2F, errored=True), "by itself")
    assert end.value.code  # a message: Python prints it and ends with status 1


@pytest.mark.parametrize(
    ("architecture", "errored", "how"),
    [
        # A signal stops the engine too, before the server.
        (D2F, True, "by a signal"),
        (D2F, False, "by itself"),
        (OTHER, True, "by itself"),
    ],
)
def test_any_other_end_stays_vllms(architecture, errored, how):
    assert serve(client(architecture, errored), how) == [how]


def test_installing_twice_wraps_once(monkeypatch):
    stock = function_of(entry.build_and_serve)
    monkeypatch.setattr(entry, "build_and_serve", stock)
    PATCH.install()
    PATCH.install()
    assert entry.build_and_serve is not stock
    assert entry.build_and_serve._d2f_original is stock


def test_still_needed():
    """Fails when vLLM's server no longer ends well after its engine died: then delete p10."""
    source = inspect.getsource(serve_http)
    assert "await server_task\n        return dummy_shutdown()" in source
    assert "async def dummy_shutdown() -> None:\n        pass" in source
