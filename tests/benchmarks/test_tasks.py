# SPDX-License-Identifier: Apache-2.0
"""The task files through lm-eval: prompts, shots, limits and grading, with answers known before.

The answers come from a script, so that what is graded is the task and nothing else; data are made
up in the official files' formats. `test_evaluate.py` goes the whole way with models.
"""

import json

import pytest

from benchmarks import evaluate
from benchmarks.tasks import sandbox

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


class Script(LM):
    """Answers every question by a function of its row, and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [
            (request.args[0], dict(request.args[1]), request.doc) for request in requests
        ]
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two problems of each task, as the official files hold them."""
    out = tmp_path_factory.mktemp("data")
    asked = [("How many legs have 3 dogs?", "3 * 4 = <<3*4=12>>12\n#### 12")]
    write(
        out / "gsm8k_test.jsonl",
        [{"question": q, "answer": a} for q, a in [*asked, ("1000 + 234?", "So.\n#### 1,234")]],
    )
    write(
        out / "gsm8k_train.jsonl",
        [{"question": f"{n} + 1?", "answer": f"It grows.\n#### {n + 1}"} for n in range(6)],
    )
    for number, (subject, solution) in enumerate(
        [
            ("algebra", r"We get $x = \boxed{\frac{1}{2}}$."),
            ("geometry", r"The area is $\boxed{12}$."),
        ]
    ):
        path = out / "test" / subject / f"{number}.json"
        path.parent.mkdir(parents=True)
        row = {"problem": f"Problem {number}?", "level": "Level 1", "type": subject.title()}
        path.write_text(json.dumps(row | {"solution": solution}), encoding="utf-8")
    write(
        out / "HumanEval.jsonl",
        [
            {
                "task_id": f"HumanEval/{number}",
                "prompt": f'def {name}(a, b):\n    """Of two numbers."""\n',
                "entry_point": name,
                "canonical_solution": f"    return a {sign} b\n",
                "test": f"def check(candidate):\n    assert candidate(7, 2) == 7 {sign} 2\n",
            }
            for number, (name, sign) in enumerate([("add", "+"), ("minus", "-")])
        ],
    )
    write(
        out / "mbpp.jsonl",
        [
            {
                "task_id": number,
                "text": f"Write a function to add {number}.",
                "code": f"def add(x):\r\n    return x + {number}",
                "test_list": [f"assert add({x}) == {x + number}" for x in range(3)],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for number in (5, 11, 12)  # 5 is not of the test split
        ],
    )
    return out


def number(doc):
    return doc["answer"].split("#### ")[1]


def boxed(doc):
    return doc["solution"].split(r"\boxed{")[1].removesuffix("}$.")


FINAL = "We think. Final Answer: The final answer is ${}$. I hope it is correct."
# Task, right answer, wrong answer, what begins a shot in the prompt, shots.
TASKS = {
    "gsm8k_dream": (lambda d: f"So. The answer is {number(d)}.", "The answer is 7.", "Q: ", 8),
    "gsm8k_llada": (lambda d: f"So.\n#### {number(d)}", "#### 7", "Question: ", 4),
    "math_dream": (lambda d: FINAL.format(boxed(d)), FINAL.format(99), "Problem:\n", 4),
    "math_llada": (lambda d: FINAL.format(boxed(d)), FINAL.format(99), "Problem:\n", 4),
    "humaneval_dream": (lambda d: d["canonical_solution"], "    return None\n", "def ", 0),
    "humaneval_llada": (lambda d: d["canonical_solution"], "    return None\n", "def ", 0),
    "mbpp_dream": (lambda d: d["code"] + "\n[DONE] more", "def add(x): return 0", "[BEGIN]", 3),
    "mbpp_llada": (lambda d: d["code"] + "\n[DONE] more", "def add(x): return 0", "[BEGIN]", 3),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_asks_and_grades(name, folder, monkeypatch):
    right, wrong, begins, shots = TASKS[name]
    task, family = name.split("_")
    if task in evaluate.PROGRAMS:
        monkeypatch.setenv(sandbox.ALLOW, "1")
        try:
            sandbox.check()
        except sandbox.SandboxError as error:
            pytest.skip(str(error))
    if task == "math":
        pytest.importorskip("math_verify")
    seen = []

    def answer(doc):
        """Answer the first problem right, the second wrong."""
        seen.append(doc)
        return right(doc) if len(seen) == 1 else wrong

    script = Script(answer)
    found = lm_eval.simple_evaluate(
        model=script,
        tasks=[f"d2f_{name}"],
        task_manager=TaskManager(
            include_path=str(evaluate.FOLDER),
            include_defaults=False,
            metadata={"data": str(folder)},
        ),
        confirm_run_unsafe_code=True,
        bootstrap_iters=0,
    )
    scores = {
        key: value
        for key, value in found["results"][f"d2f_{name}"].items()
        if isinstance(value, float) and "stderr" not in key
    }
    assert len(seen) == 2 and scores and set(scores.values()) == {0.5}, scores
    for prompt, options, doc in script.asked:
        assert prompt.count(begins) == shots + 1
        assert options["max_gen_toks"] == evaluate.max_tokens(task, f"{family}-{task}")
        assert options["temperature"] == 0 and not options["do_sample"]
        asked = doc.get("question") or doc.get("problem") or doc.get("prompt") or doc["text"]
        assert asked.strip() in prompt
