# SPDX-License-Identifier: Apache-2.0
"""The stage runner: resumable by stage and by point, bounded, and honest about what it left out."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import run as runner
from benchmarks.gpu.stage import DONE, FAILED, MORE, STAGES, Skip, Stage, Unfinished, drive
from benchmarks.gpu.store import ATTEMPTS, Mismatch, Store, read

ROOT = Path(__file__).resolve().parents[3]
ABOUT = {"device": "made up", "quick": False}
FAR = float("inf")

WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu.store import Store
out, stage, part, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
with (out / "calls").open("a") as calls:
    calls.write(part + "\\n")
store = Store(out / f"{{stage}}.json", stage, {about!r})
if how == "import":
    sys.exit(1)
for number in range(5):
    key = f"{{part}}/{{number}}"
    if store.settled(key):
        continue
    store.begin(key)
    print("measuring", key, flush=True)
    if how == "dies" and number == 3:
        os._exit(9)
    store.add(key, {{"value": number}})
    if number % 2:
        sys.exit(75)
store.finish(part)
"""


@pytest.fixture
def plan(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return runner.Plan(out, tmp_path / "work", seconds=300, limit=120)


@pytest.fixture
def worker(tmp_path, plan):
    """What runs a part: a script that keeps the contract of `stage`, without torch."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), about=ABOUT))

    def make(how):
        return lambda stage, part, seconds: [
            sys.executable, str(script), str(plan.out), stage.name, part, how,
        ]  # fmt: skip

    return make


TWO = Stage("x", "made-up", "nowhere", ("first", "second"))
PARTS = [(TWO, part) for part in TWO.parts]


def calls(plan):
    file = plan.out / "calls"
    return file.read_text().split() if file.exists() else []


def test_points_are_measured_once_and_parts_are_skipped_when_finished(plan, worker):
    assert runner.run(plan, PARTS[:1], worker("works")) == DONE
    assert calls(plan) == ["first"] * 3  # two points, two points, the last one
    data = read(plan.out / "made-up.json")
    assert data["finished"] == ["first"]
    assert {key: p["value"] for key, p in data["points"].items()} == {
        f"first/{n}": n for n in range(5)
    }
    assert runner.run(plan, PARTS, worker("works")) == DONE
    assert calls(plan) == ["first"] * 3 + ["second"] * 3
    assert runner.run(plan, PARTS, worker("works")) == DONE
    assert len(calls(plan)) == 6
    log = (plan.out / runner.LOG).read_text()
    assert log.count("measuring") == 10 and "all parts are finished" in log


def test_a_point_that_ends_its_process_is_given_up_and_the_rest_is_measured(plan, worker):
    assert runner.run(plan, PARTS, worker("dies")) == DONE
    data = read(plan.out / "made-up.json")
    assert data["failed"].keys() == {"first/3", "second/3"}
    assert "run.log" in data["failed"]["first/3"]
    assert data["points"].keys() == {f"{p}/{n}" for p in TWO.parts for n in (0, 1, 2, 4)}
    # Twice in the point, then once without it.
    assert 3 <= calls(plan).count("first") <= 4 + ATTEMPTS


def test_a_part_that_cannot_start_is_left_and_the_next_one_runs(plan, worker):
    def command(stage, part, seconds):
        return worker("import" if part == "first" else "works")(stage, part, seconds)

    assert runner.run(plan, PARTS, command) == 1
    assert calls(plan).count("first") == runner.FRUITLESS
    assert read(plan.out / "made-up.json")["finished"] == ["second"]
    assert "not finished: made-up/first" in (plan.out / runner.LOG).read_text()


def test_without_time_nothing_is_started_and_the_caller_is_told(plan, worker):
    late = runner.Plan(plan.out, plan.work, seconds=0)
    assert runner.run(late, PARTS, worker("works")) == MORE
    assert calls(plan) == []
    assert "run the same command again" in (plan.out / runner.LOG).read_text()


def test_a_process_is_killed_at_its_limit_with_what_it_started(plan):
    child = plan.out / "child"
    words = ["sh", "-c", f"sleep 3600 & echo $! > {child}.part; mv {child}.part {child}; wait"]
    while not child.exists():  # on a busy machine the shell itself may be late
        assert runner.run_part(plan, "hangs", words, 3) < 0
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
        "from benchmarks.gpu import run\n"
        f"words = ['sh', '-c', 'echo $$ > {plan}.part; mv {plan}.part {plan}; sleep 3600']\n"
        "run.Plan.command = lambda *_: words\n"
        "sys.exit(run.main(['--rehearse', '--out', sys.argv[1], 'kernels/host']))\n"
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


def test_results_are_copied_after_every_part(plan, worker, tmp_path):
    target = tmp_path / "copy"
    runner.run(runner.Plan(plan.out, plan.work, 300, copy_to=target), PARTS[:1], worker("works"))
    assert read(target / "made-up.json")["finished"] == ["first"]
    assert (target / runner.LOG).exists()


def test_what_cannot_travel_is_named(plan):
    for number in range(runner.MAX_FILES):
        (plan.out / f"{number}.json").touch()
    assert runner.too_large(plan.out) == []
    with (plan.out / "large.json").open("wb") as file:
        file.truncate(runner.MAX_BYTES + 1)
    problems = runner.too_large(plan.out)
    assert "large.json" in problems[0] and "9 files" in problems[1]
    log = plan.out / runner.LOG
    with log.open("wb") as file:
        file.truncate(runner.MAX_LOG + 1)
        file.seek(0, os.SEEK_END)
        file.write(b"the end")
    runner.trim(log)
    assert log.stat().st_size <= runner.MAX_LOG and log.read_bytes().endswith(b"the end")


def test_all_stages_fit_the_way_back():
    """A file per stage, the log and the models."""
    assert len(STAGES) + 2 <= runner.MAX_FILES
    assert {stage.letter for stage in STAGES} == set("abcdef")
    from benchmarks.gpu.stage import LIMIT_S

    assert LIMIT_S < 8 * 60


def test_stages_are_chosen_by_letter_name_or_part():
    assert runner.select([]) == [(s, p) for s in STAGES for p in s.parts]
    assert {s.name for s, _ in runner.select(["d"])} == {"steps"}
    assert [(s.name, p) for s, p in runner.select(["steps/qwen"])] == [("steps", "qwen")]
    with pytest.raises(ValueError, match="there are kernels"):
        runner.select(["nonsense"])
    with pytest.raises(SystemExit):
        runner.parse(["nonsense"])


# The store and the loop.


def make(tmp_path, **about):
    return Store(tmp_path / "s.json", "s", {**ABOUT, **about})


def test_every_kind_of_point_is_settled_and_a_failure_ends_the_process(tmp_path):
    store = make(tmp_path)
    seen = []

    def points():
        for key in "abcd":
            yield key, lambda k=key: measure(k)

    def measure(key):
        seen.append(key)
        if key == "b":
            raise Skip("not here")
        if key == "c":
            raise RuntimeError("CUDA error: made up")
        return {"ms": 1.0}

    assert drive(store, "p", points(), FAR) == FAILED
    assert seen == ["a", "b", "c"] and not store.finished("p")
    assert drive(make(tmp_path), "p", points(), FAR) == DONE
    data = read(tmp_path / "s.json")
    assert data["points"] == {"a": {"ms": 1.0}, "d": {"ms": 1.0}}
    assert data["skipped"] == {"b": "not here"} and "made up" in data["failed"]["c"]
    assert data["attempts"] == {} and data["finished"] == ["p"]
    assert seen == ["a", "b", "c", "d"]
    store = Store(tmp_path / "s.json", "s", {})
    store.retry_failed()
    assert not store.finished("p") and not store.settled("c") and store.settled("b")


def test_no_point_begins_after_the_deadline(tmp_path):
    store = make(tmp_path)
    assert drive(store, "p", iter([("a", dict)]), time.monotonic() - 1) == MORE
    assert not store.settled("a") and not store.finished("p")


def test_one_point_per_process(tmp_path):
    points = [("a", dict), ("b", dict)]
    assert drive(make(tmp_path), "p", iter(points), FAR, one_per_process=True) == MORE
    assert drive(make(tmp_path), "p", iter(points), FAR, one_per_process=True) == MORE
    assert drive(make(tmp_path), "p", iter(points), FAR, one_per_process=True) == DONE


def test_an_unfinished_point_goes_on_as_often_as_it_takes(tmp_path):
    def measure():
        raise Unfinished("checkpoint")

    for _ in range(ATTEMPTS + 3):
        assert drive(make(tmp_path), "p", iter([("a", measure)]), FAR) == MORE
    assert not make(tmp_path).settled("a")


def test_other_devices_and_options_are_not_mixed(tmp_path):
    make(tmp_path).add("a", {})
    with pytest.raises(Mismatch, match="quick = False, this run has True; give another OUT"):
        make(tmp_path, quick=True)
    (tmp_path / "s.json").write_text(json.dumps({"stage": "s"}))
    with pytest.raises(Mismatch, match="delete it"):
        make(tmp_path)


def test_a_device_is_needed_or_a_rehearsal(tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main(["--out", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_a_real_part_skips_what_needs_a_device(tmp_path):
    """The process of a part with its own command: a `Skip` is a `Skip` there."""
    plan = runner.Plan(tmp_path / "out", tmp_path / "work", 600, quick=True, rehearse=True)
    assert runner.run(plan, runner.select(["kernels/confidence"])) == DONE
    data = read(tmp_path / "out" / "kernels.json")
    assert data["finished"] == ["confidence"] and data["failed"] == {} == data["points"]
    assert len(data["skipped"]) == 20 and "CUDA" in str(data["skipped"])
    assert data["about"]["rehearse"] and "CPU" in data["about"]["device"]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every stage on a CPU with tiny shapes, through run.sh: minutes."""
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu/run.sh"), "--rehearse"],
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
    assert runner.too_large(tmp_path / "out") == []
    for stage in STAGES:
        data = read(tmp_path / "out" / f"{stage.name}.json")
        assert set(data["finished"]) == set(stage.parts)
        assert data["failed"] == {} and data["points"], (stage.name, data["failed"])
        assert str(tmp_path) not in (tmp_path / "out" / f"{stage.name}.json").read_text()
    assert (tmp_path / "out" / "models.tar.gz").stat().st_size > 1000

    from benchmarks.gpu.report import collect, document

    text = document(collect(tmp_path / "out"), "report")
    assert "A rehearsal on a CPU" in text and "## Steps" in text


def test_device_tests_are_collected_where_there_is_only_a_bundle(tmp_path, monkeypatch):
    """It holds three folders of the repository; tests of the others are not looked at."""
    from benchmarks.gpu.bundle import REPOSITORY
    from benchmarks.gpu.kernels import device_tests

    for folder in REPOSITORY:
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    files = device_tests("tests")
    assert {"tests/test_no_host_wait.py", "tests/kernels/test_rows.py"} <= set(files)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run([*words, "-m", "gpu", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_a_step_waits_for_nothing_on_a_device" in done.stdout
