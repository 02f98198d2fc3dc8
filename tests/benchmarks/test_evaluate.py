# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the tasks are the paper's, the sandbox holds, and scores mean something."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import evaluate
from benchmarks.tasks import data, sandbox
from vllm_d2f.settings import PRESETS, settings_from_dict

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "benchmarks" / "tasks"


class Loader(yaml.SafeLoader):
    """Task files without their functions."""


Loader.add_constructor("!function", lambda loader, node: f"function {node.value}")


def task_file(name):
    loaded = yaml.load((TASKS / f"{name}.yaml").read_text(), Loader)
    if "include" in loaded:
        loaded = task_file(loaded.pop("include").removesuffix(".yaml")) | loaded
    return loaded


# Tasks


@pytest.mark.parametrize(
    ("preset", "shots", "tokens"),
    [
        ("dream-gsm8k", 8, 256), ("dream-mbpp", 3, 256), ("dream-math", 4, 256),
        ("dream-humaneval", 0, 256), ("llada-gsm8k", 4, 512), ("llada-mbpp", 3, 512),
        ("llada-math", 4, 512), ("llada-humaneval", 0, 512),
    ],
)  # fmt: skip
def test_task_files_have_the_published_shots_and_lengths(preset, shots, tokens):
    family, task = preset.split("-")
    found = task_file(f"{task}_{family}")
    assert found["task"] == evaluate.task_name(task, preset)
    assert found["num_fewshot"] == shots
    assert found["generation_kwargs"]["max_gen_toks"] == tokens
    assert found["generation_kwargs"]["temperature"] == 0
    assert evaluate.max_tokens(task, preset) == tokens
    samples = found.get("fewshot_config", {}).get("samples", [])
    assert isinstance(samples, str) or len(samples) in (0, shots)
    assert found.get("unsafe_code", False) == (task in evaluate.PROGRAMS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_get_a_window_for_the_whole_answer(preset):
    task = preset.split("-")[1]
    settings = settings_from_dict(evaluate.d2f_section(task, preset))
    assert settings.window >= evaluate.max_tokens(task, preset)
    assert settings.params.block_size == PRESETS[preset]["block_size"]


# Data


def test_questions_come_from_a_folder(tmp_path):
    packed = gzip.compress(b'{"task_id": "HumanEval/0"}\n')
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(packed)
    rows = "".join(json.dumps({"task_id": i}) + "\n" for i in range(1, 601))
    (tmp_path / "mbpp.jsonl").write_text(rows)
    (tmp_path / "test" / "algebra").mkdir(parents=True)
    (tmp_path / "test" / "algebra" / "1.json").write_text('{"problem": "p"}')
    assert data.read("humaneval", tmp_path, "test") == [{"task_id": "HumanEval/0"}]
    assert [r["task_id"] for r in data.read("mbpp", tmp_path, "test")] == list(range(11, 511))
    assert data.read("math", tmp_path, "test") == [{"problem": "p"}]


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--task", "gsm8k", "--data", "/no/such"], ["--data", "gsm8k_test.jsonl"]),
        (["--task", "math", "--data", "."], ["math_test.jsonl"]),
        (["--task", "gsm8k", "--preset", "dream-math"], ["dream-gsm8k, llada-gsm8k"]),
        (["--task", "humaneval"], ["--allow-code-execution"]),
        (["--model", "/no/such/folder"], ["--model"]),
    ],
)
def test_what_is_missing_is_said(arguments, hints, capsys, monkeypatch):
    monkeypatch.delenv(sandbox.ALLOW, raising=False)
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluate, "find_spec", lambda name: name)
    assert evaluate.main(arguments) == 2
    told = capsys.readouterr().err
    assert all(hint in told for hint in hints), told


# Sandbox


def can_confine():
    try:
        return sandbox.run_program("").passed
    except sandbox.SandboxError:
        return False


confined = pytest.mark.skipif(not can_confine(), reason="no namespaces for this user")


@confined
@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b):\n    return a + b\nassert add(2, 3) == 5",
        "import collections, decimal, heapq, itertools, json, re, socket, typing, unicodedata",
        "open('notes', 'w').write('x')\nassert open('notes').read() == 'x'",
        "import os\nassert 'HOME' not in os.environ and 'PATH' not in os.environ",
    ],
)
def test_right_programs_pass(code):
    assert sandbox.run_program(code) == sandbox.Outcome(True, "passed")


@confined
@pytest.mark.parametrize(
    "code",
    [
        "assert 1 == 2",
        "def f(:",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "bytearray(4 << 30)",
        "[].append(*[[0] * 10**10])",
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "f = open('big', 'wb')\nfor _ in range(99): f.write(bytes(1 << 20)); f.flush()",
        "import socket; socket.create_connection(('127.0.0.1', 80), 2)",
        "import socket; socket.create_connection(('192.0.2.1', 80), 2)",
        "import ctypes; assert ctypes.CDLL(None).mount(None, b'/', None, 32, None) == 0",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
    ],
)
def test_wrong_and_harmful_programs_do_not_pass(code):
    outcome = sandbox.run_program(code)
    assert not outcome.passed and outcome.reason


@confined
def test_endless_programs_are_stopped():
    busy = sandbox.run_program("while True: pass", cpu_seconds=1)
    assert busy.reason == "no end within 1 s of CPU time"
    idle = sandbox.run_program("import time; time.sleep(600)", wall_seconds=2)
    assert idle.reason == "no end within 2 s"


@confined
def test_nothing_outside_is_written_or_removed(tmp_path):
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("safe")
    victim.chmod(0o666)
    for code in (
        f"open({str(victim)!r}, 'w').write('x')",
        f"import os; os.remove({str(victim)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.chmod({str(victim)!r}, 0)",
    ):
        assert not sandbox.run_program(code).passed
    assert victim.read_text() == "safe" and [p.name for p in tmp_path.iterdir()] == ["victim"]


@confined
def test_other_processes_are_out_of_reach():
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert not sandbox.run_program(f"import os; os.kill({bystander.pid}, 9)").passed
        sandbox.run_program("import os; os.kill(-1, 9)")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_nothing_runs_without_permission(monkeypatch):
    monkeypatch.delenv(sandbox.ALLOW, raising=False)
    with pytest.raises(sandbox.SandboxError, match="--allow-code-execution"):
        sandbox.pass_at_1(["assert True"], [["x = 1"]])


@confined
def test_pass_at_1(monkeypatch):
    monkeypatch.setenv(sandbox.ALLOW, "1")
    programs = sandbox.with_prompt(
        [["    return 1\n"], ["    return 2\n"]], [{"prompt": "def f():\n"}] * 2
    )
    assert sandbox.pass_at_1(["assert f() == 1"] * 2, programs) == 0.5


def test_prompts_that_were_cut_are_counted():
    args = evaluate.parse(["--max-model-len", "96"])  # 64 of them for the answer
    short, long = ({"arguments": ((text, {}),)} for text in ("1 + 1 =", "Leo has 7 pens. " * 30))
    assert evaluate.cut_prompts(args, [short, long], chat=False) == 1
    report = {
        **dict(score={"exact": 1.0}, shots=0, seconds=1.0, model="m", task="t", command="c"),
        "hardware": {"cpu": "x", "threads": 1},
        **dict(problems=2, of=2, max_tokens=64, through="vllm", preset=None, prompts_cut=1),
    }
    assert "1 of 2 prompts lost their beginning" in "\n".join(evaluate.markdown(report))
    assert "lost their beginning" not in "".join(evaluate.markdown(report | {"prompts_cut": 0}))


# The whole way


def run(path, *arguments):
    command = [sys.executable, "-m", "benchmarks.evaluate", "--quick", "--json", str(path)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(path.parent) not in path.read_text()
    return json.loads(path.read_text())


@pytest.mark.slow
def test_quick(tmp_path):
    pytest.importorskip("lm_eval")
    report = run(tmp_path / "evaluate.json")
    assert report["score"]["exact_match"] >= 0.75
    assert (report["problems"], report["of"], report["through"]) == (8, 500, "vllm")
    assert {"units", "versions", "hardware", "seconds", "d2f"} <= report.keys()
    assert report["samples"][0]["answer"] == report["samples"][0]["want"]
    assert report["prompts_cut"] == 0


@pytest.mark.slow
def test_a_broken_model_scores_low(tmp_path, broken_model):
    pytest.importorskip("lm_eval")
    report = run(tmp_path / "evaluate.json", "--model", str(broken_model))
    assert report["score"]["exact_match"] == 0
