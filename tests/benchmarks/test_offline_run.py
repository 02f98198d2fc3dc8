# SPDX-License-Identifier: Apache-2.0
"""The loop over the experiments of a GPU host: resumable, bounded, honest about what is left."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness.record import ATTEMPTS, TIME_IS_UP
from benchmarks.offline import run as runner
from benchmarks.offline.run import Step

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """
import os, sys
sys.path.insert(0, {root!r})
from benchmarks.harness import record
name, how, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
with open({calls!r}, "a") as calls:
    calls.write(name + "\\n")
if how == "import":
    sys.exit(1)

measured = []

def measure(run):
    def one(number):
        print("measuring", name, number, flush=True)
        if how == "dies" and number == 3:
            os._exit(9)
        measured.append(number)
        return number

    for number in range(5):
        run.point(str(number), lambda n=number: one(n), may_fail=True)
        if len(measured) == 2 and how == "works":
            run.stop()
    run.write(run.report(points=run.points))

args = record.Parser(name, None).finish(arguments, {{}})
sys.exit(record.main(measure, args, lambda report: [str(report["points"])], {{}}))
"""
TWO = (Step("first", "x", 120), Step("second", "x", 120))


@pytest.fixture
def plan(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return runner.Plan(out, seconds=300)


@pytest.fixture
def behave(tmp_path, monkeypatch):
    """Experiments that do as they are told, through the record, without a device."""
    script = tmp_path / "experiment.py"
    script.write_text(EXPERIMENT.format(root=str(ROOT), calls=str(tmp_path / "calls")))
    words = runner.Plan.words

    def behave(**how):
        def instead(plan, step, seconds):
            options = words(plan, step, seconds)[3:]
            return [sys.executable, str(script), step.name, how[step.name], *options]

        monkeypatch.setattr(runner.Plan, "words", instead)

    return behave


@pytest.fixture
def calls(tmp_path):
    file = tmp_path / "calls"
    return lambda: file.read_text().split() if file.exists() else []


def result(plan, name):
    return json.loads((plan.out / f"{name}.json").read_text())


def test_points_are_measured_once_and_finished_steps_are_skipped(plan, behave, calls):
    behave(first="works", second="works")
    assert runner.run(plan, TWO[:1]) == 0
    assert calls() == ["first"] * 3  # two points, two points, the last one
    assert result(plan, "first")["points"] == {str(n): n for n in range(5)}
    assert not (plan.out / "first.jsonl").exists()
    assert runner.run(plan, TWO) == 0
    assert runner.run(plan, TWO) == 0
    assert calls() == ["first"] * 3 + ["second"] * 3
    log = (plan.out / runner.LOG).read_text()
    assert log.count("measuring") == 10 and "all is measured" in log


def test_a_point_that_ends_its_process_is_given_up_and_the_rest_is_measured(plan, behave, calls):
    behave(first="dies", second="works")
    assert runner.run(plan, TWO) == 0
    found = result(plan, "first")
    assert found["points"].keys() == {"0", "1", "2", "4"}
    assert "the process ended 2 times" in found["failed"]["3"]
    assert calls().count("first") == ATTEMPTS + 1


def test_a_step_that_cannot_start_is_left_and_the_next_one_runs(plan, behave, calls):
    behave(first="import", second="works")
    assert runner.run(plan, TWO) == 1
    assert calls().count("first") == runner.FRUITLESS
    assert len(result(plan, "second")["points"]) == 5
    assert "not finished: first" in (plan.out / runner.LOG).read_text()


def test_without_time_nothing_is_started_and_the_caller_is_told(plan, behave, calls):
    behave(first="works", second="works")
    assert runner.run(runner.Plan(plan.out, seconds=0), TWO) == TIME_IS_UP
    assert calls() == []
    assert "run the same command again" in (plan.out / runner.LOG).read_text()


def test_a_process_is_killed_at_its_limit_with_what_it_started(plan):
    child = plan.out / "child"
    words = ["sh", "-c", f"sleep 3600 & echo $! > {child}.part; mv {child}.part {child}; wait"]
    while not child.exists():  # on a busy machine the shell itself may be late
        assert runner.process(plan, "hangs", words, 3) < 0
    pid = int(child.read_text())
    for _ in range(600):
        if not _alive(pid):
            break
        time.sleep(0.1)
    assert not _alive(pid)
    assert "killed after 3 s" in (plan.out / runner.LOG).read_text()


def test_a_command_that_is_cut_off_takes_its_part_with_it(tmp_path):
    """As a host's time limit does it: SIGTERM to the runner."""
    plan = tmp_path / "pid"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from benchmarks.offline import run\n"
        f"words = ['sh', '-c', 'echo $$ > {plan}.part; mv {plan}.part {plan}; sleep 3600']\n"
        "run.Plan.words = lambda *_: words\n"
        "sys.exit(run.main(['--rehearse', '--out', sys.argv[1], 'kernels']))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        for _ in range(1200):
            if plan.exists():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(120) == 128 + 15
    pid = int(plan.read_text())
    for _ in range(600):
        if not _alive(pid):
            break
        time.sleep(0.1)
    assert not _alive(pid)


def _alive(pid):
    """Running; a killed process that nobody waits for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_results_are_copied_after_every_process(plan, behave, tmp_path):
    behave(first="works")
    target = tmp_path / "copy"
    runner.run(runner.Plan(plan.out, 300, copy_to=target), TWO[:1])
    assert json.loads((target / "first.json").read_text()) == result(plan, "first")
    assert (target / runner.LOG).exists()


def test_steps_are_chosen_by_name_and_have_limits(tmp_path):
    assert runner.parse([]).steps == list(runner.STEPS)
    assert [step.name for step in runner.parse(["steps", "steps_llada"]).steps] == [
        "steps",
        "steps_llada",
    ]
    with pytest.raises(SystemExit):
        runner.parse(["nonsense"])
    assert all(step.seconds <= 8 * 60 for step in (*runner.STEPS, *runner.MORE))
    assert sum(step.seconds for step in runner.STEPS[:2]) < 6 * 60  # what comes first fits


@pytest.mark.parametrize("step", (*runner.STEPS, *runner.MORE), ids=lambda step: step.name)
def test_commands_parse(step, tmp_path, monkeypatch):
    """On a GPU, and in a rehearsal."""
    import importlib

    import torch

    for rehearse in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda rehearse=rehearse: not rehearse)
        words = runner.Plan(tmp_path, 60, rehearse).words(step, 100.0)
        assert importlib.import_module(words[2]).parse(words[3:]).minutes == 1.25


def test_a_device_is_needed_or_a_rehearsal(tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main(["--out", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_a_real_step_skips_what_needs_a_device(plan):
    """The kernels as the loop runs them; folders of tests are left out for time."""
    step = Step("kernels", "kernels --rows 32 --tests", 500)
    assert runner.run(runner.Plan(plan.out, 600, rehearse=True), [step]) == 0
    found = result(plan, "kernels")
    assert len(found["skipped"]) == 10 and "CUDA" in str(found["skipped"])
    assert found["rehearse"] and "failed" not in found and found["points"].keys() >= {"found"}
    assert "A rehearsal on a CPU" in (plan.out / "kernels.md").read_text()


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every step on a CPU with tiny shapes, through run.sh: minutes."""
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/offline/run.sh"), "--rehearse"],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "BUNDLE": "",
            "OUT": str(tmp_path / "out"),
            "WORK": str(tmp_path / "work"),
        },
        capture_output=True,
        text=True,
        timeout=3000,
    )
    log = (tmp_path / "out" / runner.LOG).read_text()
    assert done.returncode == 0, done.stdout[-3000:] + log[-6000:]
    for step in runner.STEPS:
        text = (tmp_path / "out" / f"{step.name}.json").read_text()
        assert "failed" not in json.loads(text) and str(tmp_path) not in text, step.name


def test_device_tests_are_collected_where_there_is_only_a_bundle(tmp_path, monkeypatch):
    """It holds three folders of the repository; tests of the others are not looked at."""
    from benchmarks.kernels import device_tests
    from benchmarks.offline.bundle import REPOSITORY

    for folder in REPOSITORY:
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    files = device_tests("tests")
    assert {"tests/worker/test_no_host_wait.py", "tests/worker/test_masked_rows.py"} <= set(files)
    assert "tests/engine/test_golden.py" in files
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run([*words, "-m", "gpu", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_a_step_waits_for_nothing_on_a_device" in done.stdout
    assert "test_authors_runs_on_a_device" in done.stdout
