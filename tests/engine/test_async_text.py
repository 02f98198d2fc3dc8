# SPDX-License-Identifier: Apache-2.0
"""Asynchronous scheduling and what reads text: grammars and stop strings. See test_async.py."""

from test_structured import ask, start, structured

from benchmarks.parity import shut_down


def test_structured_outputs_and_stop_strings():
    """The same answers as with synchronous scheduling, engine after engine."""
    from vllm import SamplingParams

    from vllm_d2f.demo import bundled_problems

    prompts = [problem.question for problem in bundled_problems()][:6]
    requests = [
        structured(regex=r"(pens|apples): [0-9]{1,4}"),
        structured(choice=["yes", "no", "maybe"]),
        structured(json={"type": "array", "items": {"type": "boolean"}, "maxItems": 3}),
        SamplingParams(temperature=0, max_tokens=64, stop=["="]),
        SamplingParams(temperature=0, max_tokens=64, stop=["="], include_stop_str_in_output=True),
        SamplingParams(temperature=0, max_tokens=64),
    ]
    texts = []
    for ahead in (True, False):
        llm = start(async_scheduling=ahead)
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling is ahead
        texts.append([answer.text for answer in ask(llm, prompts, requests)])
        shut_down(llm)
    assert texts[0] == texts[1]
    assert texts[0][4].endswith("=") and "=" not in texts[0][3]
