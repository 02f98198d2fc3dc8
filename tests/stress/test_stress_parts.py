# SPDX-License-Identifier: Apache-2.0
"""How the stress tests judge what they saw: in seconds, in the default suite."""

import asyncio
import json
import os
import random

import httpx
import pytest
from stress import faults, fuzz, overload, report, soak, traffic
from stress.server import growth, log_errors, memory, parse_metrics

METRICS = """
# HELP vllm:kv_cache_usage_perc KV-cache usage.
vllm:kv_cache_usage_perc{engine="0",model_name="d2f-tiny"} 0.25
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_running{engine="1"} 1.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:num_preemptions_total{engine="0"} 3.0
vllm:d2f_open_blocks{engine="0"} 4.0
"""


def test_metrics_by_name_and_summed():
    assert parse_metrics(METRICS) == {
        "pages_in_use": 0.25,
        "running": 3.0,
        "waiting": 0.0,
        "open_blocks": 4.0,
        "preemptions": 3.0,
    }


def test_growth_after_the_warm_up():
    samples = [(0.0, 10.0), (900.0, 100.0), (1800.0, 101.0), (2700.0, 102.0)]
    assert growth(samples, 600) == {"first": 100.0, "last": 102.0, "slope": 4.0}
    with pytest.raises(ValueError, match="run for longer"):
        growth(samples, warm_up=2000)


def test_memory_of_a_process():
    assert memory(os.getpid())["API server"] > 10


def test_errors_in_a_log():
    log = "INFO all is well\n(EngineCore) ERROR 01-01 no\nTraceback (most recent call last):\n"
    assert len(log_errors(log)) == 2
    asked_for = (
        "ERROR Error in completion stream generator.\n"
        "ERROR Traceback (most recent call last):\n"
        "ERROR vllm.exceptions.VLLMValidationError: d2f_tau_conf must be a number in [0, 1]\n"
    )
    assert log_errors(asked_for) == []
    assert len(log_errors(asked_for + log)) == 2


def good_soak():
    return {
        "memory_mib": {"engine": {"last": 100.0, "allowed": 110.0}},
        "left_at_quiet_moments": [],
        "log_errors": [],
        "traffic": {"wrong": 0, "equal_to_the_reference": 5},
        "alive": True,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"memory_mib": {"engine": {"last": 111.0, "allowed": 110.0}}},
        {"left_at_quiet_moments": [{"pages_in_use": 0.1}]},
        {"log_errors": ["ERROR"]},
        {"traffic": {"wrong": 1, "equal_to_the_reference": 5}},
        {"traffic": {"wrong": 0, "equal_to_the_reference": 0}},
        {"alive": False},
    ],
)
def test_a_soak_passes_only_if_all_is_well(change):
    assert soak.failures(good_soak()) == []
    assert len(soak.failures(good_soak() | change)) == 1


def test_what_is_left_of_the_throughput():
    levels = [{"speed": 50.0}, {"speed": 100.0}, {"speed": 75.0}]
    assert overload.share_left(levels, "speed") == 0.75


def good_overload():
    level = {"wrong": 0, "out_of_order": 0, "leaks": {}, "preemptions": 9}
    level["positions_per_token"] = 2.5
    traffic = {"wrong": 0, "refused_as_they_must_be": {"503": 4}}
    over_http = {"traffic": traffic, "within_deadline": True, "left": {}}
    http = {"levels": [over_http], "log_errors": [], "alive": True}
    return {"in_process": [level, level], "cpu_throughput_left": 0.7, "http": http}


def changed(report, path, value):
    """Return a copy of a report with one value changed."""
    copy = json.loads(json.dumps(report))
    *parents, name = path
    part = copy
    for parent in parents:
        part = part[parent]
    part[name] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("in_process", 0, "wrong"), 1),
        (("in_process", 0, "out_of_order"), 1),
        (("in_process", 0, "leaks"), {"pages": 1}),
        (("in_process", 1, "preemptions"), 0),
        (("in_process", 1, "positions_per_token"), 5.1),
        (("cpu_throughput_left",), 0.4),
        (("http", "levels", 0, "traffic", "wrong"), 1),
        (("http", "levels", 0, "within_deadline"), False),
        (("http", "levels", 0, "left"), {"running": 1.0}),
        (("http", "levels", 0, "traffic", "refused_as_they_must_be"), {}),
        (("http", "log_errors"), ["ERROR"]),
        (("http", "alive"), False),
    ],
)
def test_overload_passes_only_if_all_is_well(path, value):
    assert overload.failures(good_overload()) == []
    assert len(overload.failures(changed(good_overload(), path, value))) == 1


@pytest.mark.parametrize(
    "change", [{"clients_answered_before": 7}, {"clients_hanging": 1}, {"status": 0}]
)
def test_a_kill_passes_only_with_status_1_and_an_error_for_every_client(change):
    good = {"in_flight": 8, "clients_answered_before": 8, "clients_hanging": 0, "status": 1}
    log = "The engine died, see the first error above"
    assert faults.failures(good, log) == []
    assert len(faults.failures(good | change, log)) == 1
    assert len(faults.failures(good, "")) == 1


def test_the_page_says_what_the_files_say():
    """`python tests/stress/report.py` renews it."""
    written = (report.RESULTS / "reliability.md").read_text(encoding="utf-8")
    assert written == report.render(report.RESULTS)
    assert "## Batch invariance" in written


@pytest.mark.parametrize(
    ("status", "kind", "message", "accepted"),
    [
        (
            501,
            "NotImplementedError",
            "The model does not support the structured decision API",
            True,
        ),
        (501, "NotImplementedError", "The model does not support Completions API", False),
        (
            501,
            "InternalServerError",
            "The model does not support the structured decision API",
            False,
        ),
        (
            500,
            "NotImplementedError",
            "The model does not support the structured decision API",
            False,
        ),
    ],
)
def test_fuzzing_takes_no_server_error_but_that_of_a_route_for_other_models(
    status, kind, message, accepted
):
    error = {"error": {"type": kind, "message": message}}
    assert fuzz.not_served(httpx.Response(status, json=error)) is accepted


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_stream_that_stands_still_before_we_hang_up_is_wrong(chunks):
    """A server that sends so many chunks and then nothing, and does not close."""
    closed = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"POST /v1/completions" in head
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"data: {}\n\n" * chunks)
        await writer.drain()
        rest = await reader.read(1 << 16)
        while rest:
            rest = await reader.read(1 << 16)
        closed.append(True)
        writer.close()

    async def hang_up(client, wanted):
        try:
            await client._hang_up({"prompt": "1"}, chunks=wanted, seconds=0.3)
        except TimeoutError:
            return "timeout"
        return "closed by us"

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, traffic.Client(f"http://127.0.0.1:{port}", 1) as client:
            return [await hang_up(client, wanted) for wanted in (1, 3)]

    expected = ["closed by us" if chunks >= wanted else "timeout" for wanted in (1, 3)]
    assert asyncio.run(asyncio.wait_for(run(), 60)) == expected


def test_an_abort_that_meets_a_stuck_stream_is_counted_as_wrong(monkeypatch):
    async def stuck(self, body, chunks=None, seconds=0.0):
        raise TimeoutError

    monkeypatch.setattr(traffic.Client, "_hang_up", stuck)
    ask = traffic.Ask("greedy", {"prompt": "1"})

    async def run():
        async with traffic.Client("http://127.0.0.1:1", 1) as client:
            for seed in range(40):
                await client.abort(ask, random.Random(seed))
            return client.tally

    tally = asyncio.run(run())
    # After chunks it is wrong; a connection that we close after a time ends in just this way.
    assert set(tally.aborted) == {"at once", "waiting", "not streamed"}
    assert len(tally.wrong) == 40 - sum(tally.aborted.values()) > 5
