# SPDX-License-Identifier: Apache-2.0
"""The whole training chain on a toy scale, by its command, and its student in the engine."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import check

from benchmarks.parity import Case, engine_answers, reference_answers, shut_down, start_engine
from training.arithmetic import problems
from training.tokenizer import build_tokenizer
from vllm_d2f.d2f import D2FParams

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    out = tmp_path_factory.mktemp("chain")
    began = time.monotonic()
    subprocess.run(
        [
            sys.executable, "-m", "training.train", "--config", "training/configs/tiny.yaml",
            "--smoke", "--out", str(out), "--threads", "1",
        ],
        cwd=ROOT, check=True, timeout=600,
    )  # fmt: skip
    return out, time.monotonic() - began


def test_the_chain_writes_its_report_and_models(chain):
    out, seconds = chain
    report = json.loads((out / "report.json").read_text())
    assert set(report["figures"]) == {"ar-tiny", "dream-tiny", "d2f-tiny"}
    for name, figures in report["figures"].items():
        # A model trained for four steps knows nothing; the figures must say so.
        assert figures["exact"] < 0.5 and figures["problems"] == 4
        assert figures["tokens_per_forward"] > 0, name
    assert set(report["training_minutes"]) == {"ar", "teacher", "student"}
    assert (out / "report.png").stat().st_size > 5000
    assert "| d2f-tiny, reference decoding |" in (out / "report.md").read_text()
    card = (out / "models" / "d2f-tiny" / "README.md").read_text()
    assert "stage `student`" in card and "held-out problems" in card
    assert seconds < 180


def test_the_student_is_served_as_it_is(chain):
    model = str(chain[0] / "models" / "d2f-tiny")
    tokenizer = build_tokenizer()
    params = D2FParams(block_size=16, max_blocks=4, tau_conf=0.9)
    prompts = [tokenizer(p.question).input_ids for p in problems("test", 6, "served")]
    cases = [Case(tuple(prompt), params, 40) for prompt in prompts]
    llm = start_engine(model, window=64, max_model_len=256)
    got = engine_answers(llm, cases, "batch")
    shut_down(llm)
    # After four steps most probabilities are nearly alike; ties are not held against the engine.
    check(cases, reference_answers(model, cases, 256), got, decisive=0)
    assert all(len(answer.tokens) == 40 or answer.tokens[-1] == 0 for answer in got)
