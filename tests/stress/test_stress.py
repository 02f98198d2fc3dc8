# SPDX-License-Identifier: Apache-2.0
"""What vllm-d2f promises under load, at length: `make stress`, some 30 minutes on two idle cores.

The soak's minutes are an option (`make stress MINUTES=60`). With `--stress-results FOLDER` each
test writes `reliability_NAME.json`, from which `report.py` renders the published page.
"""

import asyncio
import os

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from stress import aborts, faults, fuzz, invariance, overload, soak
from stress.server import log_errors
from stress.traffic import MODEL, SERVER_OPTIONS, server_asks

from benchmarks.harness.server import launch
from vllm_d2f import register

pytestmark = pytest.mark.stress

START_SECONDS = 600


@pytest.fixture(scope="module", autouse=True)
def plugin():
    register()


def command(options):
    return f"vllm serve {MODEL} {' '.join(options)}"


def test_soak(request, stress_result):
    """Hours of mixed traffic: every answer right, nothing left, no growth, no error."""
    seconds = 60 * request.config.getoption("--stress-minutes")
    asks = server_asks(400, seed=0)
    with launch(MODEL, soak.OPTIONS, START_SECONDS) as server:
        run = soak.soak(server, asks, seconds)
        report = asyncio.run(asyncio.wait_for(run, seconds + 2400))
    report["server"] = command(soak.OPTIONS)
    stress_result("soak", report, soak.failures(report))


def test_overload(stress_result):
    """Ten times more than fits: right, in order, and most of the throughput is left."""
    report = overload.in_process()
    asks = server_asks(120, 0, overload.KINDS)
    with launch(MODEL, overload.OPTIONS, START_SECONDS) as server:
        levels = [
            asyncio.run(overload.over_http(server.url, asks, clients, requests=200))
            for clients in overload.CLIENTS
        ]
        errors, alive = log_errors(server.read_log())[:20], server.process.poll() is None
    report["http"] = {
        "server": command(overload.OPTIONS),
        "levels": levels,
        "log_errors": errors,
        "alive": alive,
    }
    report["http_throughput_left"] = overload.share_left(levels, "tokens_per_second")
    stress_result("overload", report, overload.failures(report))


def test_10_000_aborts(stress_result):
    """At every stage, on two engines and over HTTP: nothing leaks, all other answers are right."""
    report = {"engines": {name: aborts.storm(name, 5000) for name in aborts.PROMPTS}}
    options = (*SERVER_OPTIONS, "--kv-cache-memory-bytes", str(1 << 27), "--max-num-seqs", "8")
    asks = server_asks(80, seed=0)
    with launch(MODEL, options, START_SECONDS) as server:
        report["http"] = asyncio.run(aborts.over_http(server.url, asks, 300))
        report["http"]["log_errors"] = log_errors(server.read_log())[:20]
    report["http"]["server"] = command(options)
    stress_result("aborts", report, aborts.failures(report))


def test_batch_invariance(stress_result):
    """1,000 requests in eight ways, 200 of them with block-causal prompts too."""
    prompts = {
        "whole prompts": invariance.run(1000, {}),
        "block-causal prompts": invariance.run(200, {"prompt_attention": "block_causal"}),
    }
    found = [f"{name}, {f}" for name, run in prompts.items() for f in invariance.failures(run)]
    stress_result("invariance", {"prompts": prompts}, found)


@pytest.mark.parametrize(
    ("title", "options"),
    [("EngineCore", ()), ("Worker", ("--distributed-executor-backend", "mp"))],
    ids=["engine", "worker"],
)
def test_a_killed_process_of_a_server(title, options, stress_result):
    """Every client gets an error, the server ends with status 1, and a new one answers the same."""
    options = (*fuzz.OPTIONS, *options)
    with launch(MODEL, options, START_SECONDS) as server:
        before = fuzz.Target(server.url, MODEL).answer
        report = faults.kill_under_load(server.url, server.process, title, clients=8)
        found = faults.failures(report, server.read_log())
    with launch(MODEL, options, START_SECONDS) as server:
        if fuzz.Target(server.url, MODEL).answer != before:
            found.append("after a restart the answer is another one")
    stress_result(f"faults_{title.lower()}", report, found)


def test_100_kills_of_a_checkpoint(tmp_path, stress_result):
    """kill -9 while a training saves: what is found loads, and its numbers are of one step."""
    folder = tmp_path / "run"
    folder.mkdir()
    report = faults.kill_checkpoints(100, folder)
    wrong = {"corrupt": 0, "restart_goes_on": True, "parts_after_restart": False}
    found = [f"{name}: {report[name]}" for name, right in wrong.items() if report[name] != right]
    stress_result("faults_checkpoint", report, found)


def test_fuzz(stress_result):
    """Thousands of bad requests: 4xx each, and the good one beside each gets its usual answer."""
    report = {}
    with launch(MODEL, fuzz.OPTIONS, START_SECONDS) as server:
        target = fuzz.Target(server.url, MODEL)
        for ask in fuzz.extremes(target):
            target.send(*ask)
        report["extremes"] = target.as_dict()
        fuzz.send_d2f_options(target, 200, seed=1)
        fuzz.send_operations(target, 60, seed=1)
        report["all"] = target.as_dict()
        alive = target.good() == target.answer
    found = [str(wrong) for wrong in target.wrong]
    found += [f"{target.changed} good answers changed"] * bool(target.changed)
    found += ["no good answer at the end"] * (not alive)
    stress_result("fuzz", report, found)
