# SPDX-License-Identifier: Apache-2.0
"""The engine, served from the golden folder, gives what the authors' own code gave.

The authors' model has heads of 16, which no CUDA backend of vLLM takes. There a copy is served
whose heads are padded with zeros.
"""

import json

import pytest
from common import GOLDEN

from benchmarks.harness.widen import widen
from benchmarks.parity import Case as Request
from benchmarks.parity import engine_answers, shut_down, start_engine
from vllm_d2f.d2f import D2FParams

RUNS = json.loads((GOLDEN / "runs.json").read_text())
END = 199


def check(model, *ways, **options):
    """Decode the runs in each way and compare tokens and forwards."""
    llm = start_engine(str(model), window=128, max_model_len=256, **options)
    cases = [
        Request(
            tuple(run["prompt"]),
            D2FParams(
                run["block_size"],
                run["max_new_tokens"] // run["block_size"],
                run["tau_add"],
                run["tau_act"],
                run["tau_conf"],
            ),
            run["max_new_tokens"],
        )
        for run in RUNS
    ]
    answers = [(way, engine_answers(llm, cases, way)) for way in ways]
    shut_down(llm)
    for way, given in answers:
        for run, answer in zip(RUNS, given, strict=True):
            if END in run["output"]:
                # The authors decode on behind an end token; up to it the text must agree.
                assert list(answer.tokens) == run["output"][: run["output"].index(END) + 1], way
                assert answer.forwards <= run["forwards"], way
            else:
                assert list(answer.tokens) == run["output"], way
                assert answer.forwards == run["forwards"], way


@pytest.mark.parametrize("way", ["batch", "single"])
def test_authors_runs(way):
    check(GOLDEN, way)


def test_authors_runs_with_larger_heads(tmp_path):
    check(widen(GOLDEN, tmp_path / "golden", 64), "batch", "single")


@pytest.mark.gpu
def test_authors_runs_on_a_device(tmp_path):
    wide = widen(GOLDEN, tmp_path / "golden", 64)
    # The tiny model needs little memory, and others may use the device.
    little = {"gpu_memory_utilization": 0.1}
    check(wide, "batch", "single", attention_backend="TRITON_ATTN", **little)
