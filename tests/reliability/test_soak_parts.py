# SPDX-License-Identifier: Apache-2.0
"""How the tools of `benchmarks/reliability` judge what they saw."""

import asyncio
import os
import random
from pathlib import Path

import httpx
import pytest

from benchmarks.reliability import aborts, audit, fuzz, overload, report, soak, traffic
from benchmarks.reliability.inside import STAGES
from benchmarks.reliability.server import growth, log_errors, memory, parse_metrics

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
    grown = growth(samples, warm_up=600)
    assert (grown.first, grown.last, grown.slope) == (100.0, 102.0, 4.0)
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
    assert soak.passed(good_soak())
    assert not soak.passed(good_soak() | change)


def test_aborts_pass_only_if_every_stage_was_hit():
    run = {"by_stage": dict.fromkeys(STAGES, 1), "leaks": [], "completed_wrong": 0}
    assert aborts.passed({"engines": {"a": run}})
    missed = run | {"by_stage": run["by_stage"] | {"preempted": 0}}
    assert not aborts.passed({"engines": {"a": missed}})
    assert aborts.passed({"engines": {"a": missed, "b": run}})
    assert not aborts.passed({"engines": {"a": run, "b": run | {"leaks": [{"pages": 1}]}}})
    assert not aborts.passed({"engines": {"a": run}, "http": {"passed": False}})


def test_what_is_left_of_the_throughput():
    levels = [{"speed": 50.0}, {"speed": 100.0}, {"speed": 75.0}]
    assert overload.ratio(levels, "speed") == 0.75


def test_the_document_says_what_the_files_say():
    """`python -m benchmarks.reliability.report` renews it."""
    written = Path(report.RESULTS / "reliability.md").read_text(encoding="utf-8")
    assert written == report.render(report.RESULTS)
    assert "## Batch invariance" in written


def test_an_audit_judges_only_what_a_record_speaks_of():
    def record(version, *vulnerabilities):
        return {"info": {"version": version}, "vulnerabilities": list(vulnerabilities)}

    versions = {"good": "1", "bad": "2", "old": "1", "mine": "0.1", "cleared": "3"}
    found = audit.judge(
        versions,
        {
            "good": record("1"),
            "bad": record("2", {"id": "CVE-1", "fixed_in": ["3"], "summary": "it is bad"}),
            # What is known of the newest release says nothing about an older one.
            "old": record("2", {"id": "CVE-2"}),
            "mine": "HTTPError: 404",
            "cleared": record("3", {"id": "CVE-3", "withdrawn": "2026-01-01"}),
        },
    )
    assert found["judged"] == ["bad==2", "cleared==3", "good==1"]
    assert found["vulnerable"] == {"bad": [{"id": "CVE-1", "fixed_in": ["3"], "what": "it is bad"}]}
    assert found["older"] == {"old": ["1", "2"]} and found["unknown"] == {"mine": "HTTPError: 404"}
    assert "vllm-d2f" in audit.installed() and "+" not in audit.installed()["torch"]


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
    assert not fuzz.not_served(None)


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
    ask = traffic.HttpAsk("greedy", {"prompt": "1"}, None, ())

    async def run():
        async with traffic.Client("http://127.0.0.1:1", 1) as client:
            for seed in range(40):
                await client.abort(ask, random.Random(seed))
            return client.tally

    tally = asyncio.run(run())
    # After chunks it is wrong; a connection that we close after a time ends in just this way.
    assert set(tally.aborted) == {"at once", "waiting", "not streamed"}
    assert len(tally.wrong) == 40 - sum(tally.aborted.values()) > 5
