# SPDX-License-Identifier: Apache-2.0
"""`make demo`: what it counts, and the whole of it once."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vllm_d2f import demo
from vllm_d2f.demo import Figures, Problem, bundled_problems, count_forwards, final_number

PROBLEM = Problem("Leo has 73 pens, finds 24 more. How many pens?", "73+24=97", 97)


def output(text: str, finish_reason: str = "stop", histogram: list[int] | None = None):
    """Return a `RequestOutput` with what the demo reads."""
    metrics = None if histogram is None else SimpleNamespace(histogram=histogram)
    completion = SimpleNamespace(
        text=text,
        finish_reason=finish_reason,
        token_ids=list(range(9)),
        spec_decode_metrics=metrics,
    )
    return SimpleNamespace(outputs=[completion])


def test_sixteen_problems_with_right_answers_are_bundled():
    problems = bundled_problems()
    assert len(problems) == len({p.question for p in problems}) == 16
    for problem in problems:
        assert final_number(problem.answer) == problem.final


def test_bundled_problems_were_not_trained_on():
    """Splits are told apart by the numbers of a problem."""
    from training.arithmetic import split_of

    for problem in bundled_problems():
        start, *steps = (int(n) for n in demo.NUMBER.findall(problem.question))
        total, signed = start, []
        for shown in problem.answer.replace("-", "+-").split("=")[:-1]:
            signed.append(int(shown.split("+")[-1]))
            total += signed[-1]
        assert total == problem.final and [abs(step) for step in signed] == steps
        assert split_of(start, tuple(signed)) == "test"


@pytest.mark.parametrize(
    ("text", "finish_reason", "right"),
    [
        ("73+24=97", "stop", True),
        ("73+24=97 ", "stop", True),
        ("73+24=98", "stop", False),
        ("73+24=97", "length", False),
        ("no idea", "stop", False),
        ("", "stop", False),
    ],
)
def test_an_answer_is_right_by_its_last_number_and_its_own_end(text, finish_reason, right):
    assert demo.is_right(output(text, finish_reason), PROBLEM) is right


def test_sentences_are_right_as_a_whole():
    from training.extract import KEYS

    problems = bundled_problems("sentences")
    assert len(problems) == len({p.question for p in problems}) == 8
    for problem in problems:
        assert problem.final is None and tuple(json.loads(problem.answer)) == KEYS
        assert demo.is_right(output(problem.answer), problem)
        assert not demo.is_right(output(problem.answer, "length"), problem)
        assert not demo.is_right(output(problem.answer[:-1]), problem)


def test_forwards_are_counted_by_vllm_or_are_the_tokens():
    assert count_forwards(output("x", histogram=[2, 0, 3])) == 5
    assert count_forwards(output("x")) == 9


def test_the_summary_fits_100_columns_and_shows_the_score_beside_the_speed():
    figures = Figures("/some/folder/d2f-tiny", 16, 15, 420, 140, 1234.5, 321.0)
    lines = demo.summary([figures]).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1].split() == ["d2f-tiny", "15", "of", "16", "3.00", "1234", "321"]


def test_the_whole_demo(tmp_path):
    """As `make demo` runs it, in a process of its own."""
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_d2f.demo", "--json", file],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Processed prompts: 100%" in done.stderr, "vLLM's progress bar"
    noise = ("WARNING", "Warning:", "Traceback", "libtcmalloc", "Triton")
    # Torch says once per engine that it binds memory, on machines with NUMA nodes.
    said = [x for x in (done.stdout + done.stderr).splitlines() if "NUMA binding" not in x]
    assert not [word for word in noise if word in "\n".join(said)]
    assert max(map(len, done.stdout.splitlines())) <= 100

    report = json.loads(file.read_text())
    assert set(report["machine"]) >= {"device", "threads", "torch", "vllm"}
    d2f, ar = report["figures"]
    assert (d2f["model"], ar["model"]) == ("d2f-tiny", "ar-tiny")
    assert d2f["right"] >= 14 and ar["right"] >= 14
    assert done.stdout.count("[right]") == d2f["right"]
    assert d2f["tokens"] / d2f["forwards"] >= 2
    assert ar["tokens"] == ar["forwards"]
    for problem in bundled_problems():
        assert problem.question in " ".join(done.stdout.split())
