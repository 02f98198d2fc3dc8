# SPDX-License-Identifier: Apache-2.0
"""Two ranks of tensor parallelism decode each block-diffusion family like the reference.

Slow: three processes start per family. vLLM binds a worker to cores, so the ranks get one each.
`reliability/test_multi_process.py` does the same over HTTP with a Dream model.
"""

import os

import pytest
from common import check
from published_runs import DATA, published_runs

from benchmarks.harness.engine import shut_down, start_engine
from benchmarks.parity import Case, engine_answers, reference_answers

MAX_LEN, WINDOW = 144, 64

pytestmark = pytest.mark.slow


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize("family", ["sdar", "llada2", "fast_dllm_v2", "stable_diffcoder"])
def test_two_ranks_equal_the_reference(monkeypatch, family):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = str(DATA / family)
    cases = [
        Case(run.prompt, run.params, run.goal)
        for run in published_runs(family)
        if len(run.prompt) + run.goal <= MAX_LEN
    ]
    llm = start_engine(model, window=WINDOW, max_model_len=MAX_LEN, tensor_parallel_size=2)
    try:
        got = engine_answers(llm, cases, "batch")
    finally:
        shut_down(llm)
    check(cases, reference_answers(model, cases, MAX_LEN), got)
