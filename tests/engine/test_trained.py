# SPDX-License-Identifier: Apache-2.0
"""The whole training chain on a toy scale, by its command, and its student in the engine."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from common import check

from benchmarks.parity import Case, engine_answers, reference_answers, shut_down, start_engine
from training.arithmetic import problems
from training.config import make_config
from training.tokenizer import build_tokenizer
from training.train import train
from vllm_d2f.d2f import D2FParams

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    out = tmp_path_factory.mktemp("chain")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            sys.executable, "-m", "training.train", "--config", "training/configs/tiny.yaml",
            "--smoke", "--out", str(out), "--threads", "1",
        ],
        cwd=ROOT, check=True, timeout=1800,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor: the clock also counts what else the machine does.
    return out, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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


CAUSAL = {
    "name": "causal",
    "model": {"base": str(ROOT / "vllm_d2f" / "embedded" / "dream-tiny")},
    "data": {"max_length": 256},
    "decoding": {"block_size": 16, "max_blocks": 4, "max_tokens": 40},
    "stages": {
        "student": {
            "objective": "d2f",
            "export": "causal",
            "steps": 6,
            "batch_size": 8,
            "evaluate": 0,
            "optimizer": {"lr": 1e-4},
            "loss": {"prompt_attention": "block_causal"},
        }
    },
}


def test_a_student_with_a_block_causal_prompt_is_served_in_chunks(tmp_path):
    """The exported folder alone says so, and prompts longer than a step's budget go in pieces."""
    train(make_config(CAUSAL), tmp_path)
    model = str(tmp_path / "models" / "causal")
    tokenizer = build_tokenizer()
    params = D2FParams(block_size=16, max_blocks=4, tau_conf=0.9)
    prompts = [tokenizer(p.question).input_ids for p in problems("test", 5, "served")]
    prompts += [prompts[0] * 3, prompts[1] * 4]  # over 64 tokens
    cases = [Case(tuple(prompt), params, 40) for prompt in prompts]
    expected = reference_answers(model, cases, 256, prompt_block=16)
    whole = reference_answers(model, cases, 256)
    assert [e.answer.tokens for e in expected] != [e.answer.tokens for e in whole]
    llm = start_engine(
        model,
        window=64,
        max_model_len=256,
        additional_config={},
        max_num_batched_tokens=64,
        async_scheduling=False,  # else a step must hold 128
    )
    vllm_config = llm.llm_engine.vllm_config
    assert vllm_config.scheduler_config.enable_chunked_prefill
    assert max(map(len, prompts)) > vllm_config.scheduler_config.max_num_batched_tokens
    got = engine_answers(llm, cases, "batch")
    shut_down(llm)
    check(cases, expected, got)


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
