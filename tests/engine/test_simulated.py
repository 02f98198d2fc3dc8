# SPDX-License-Identifier: Apache-2.0
"""Simulated acceptance: the asked tokens per forward, from dummy weights."""

import json

import pytest
from vllm import SamplingParams

from benchmarks.parity import shut_down, start_engine
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.settings import settings_from_dict


@pytest.mark.parametrize("wanted", [1.0, 2.9, 6.0])
def test_tokens_per_forward(dream, wanted):
    section = {"block_size": 16, "max_blocks": 4, "simulate_tokens_per_forward": wanted}
    llm = start_engine(
        dream,
        window=64,
        max_model_len=512,
        load_format="dummy",
        additional_config={"d2f": section},
    )
    request = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": [1, 2, 3 + i]} for i in range(3)], request)
    shut_down(llm)
    for output in outputs:
        forwards = denoising_forwards(output.outputs[0])
        assert len(output.outputs[0].token_ids) == 256
        assert 256 / forwards == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("wrong", [0.5, 65, "2", True])
def test_out_of_range(wrong):
    with pytest.raises(
        ValueError, match=r"simulate_tokens_per_forward must be a number in \[1, 64\]"
    ):
        settings_from_dict({"block_size": 16, "simulate_tokens_per_forward": wrong})


def test_settings_survive_the_trip_through_the_config():
    settings = settings_from_dict({"block_size": 16, "simulate_tokens_per_forward": 2.5})
    assert settings_from_dict(json.loads(json.dumps(settings.as_dict()))) == settings
