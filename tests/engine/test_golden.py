# SPDX-License-Identifier: Apache-2.0
"""The engine, served from the golden folder, gives what the authors' own code gave."""

import json

import pytest
from common import GOLDEN

from benchmarks.parity import Case as Request
from benchmarks.parity import engine_answers, shut_down, start_engine
from vllm_d2f.d2f import D2FParams

RUNS = json.loads((GOLDEN / "runs.json").read_text())
END = 199


@pytest.mark.parametrize("way", ["batch", "single"])
def test_authors_runs(way):
    llm = start_engine(str(GOLDEN), window=128, max_model_len=256)
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
    answers = engine_answers(llm, cases, way)
    shut_down(llm)
    for run, answer in zip(RUNS, answers, strict=True):
        if END in run["output"]:
            # The authors decode on behind an end token; up to it the text must agree.
            assert list(answer.tokens) == run["output"][: run["output"].index(END) + 1]
            assert answer.forwards <= run["forwards"]
        else:
            assert list(answer.tokens) == run["output"]
            assert answer.forwards == run["forwards"]
