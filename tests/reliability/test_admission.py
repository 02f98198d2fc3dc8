# SPDX-License-Identifier: Apache-2.0
"""Numbers that no tensor or message can hold are refused at admission, before the engine sees them.

Each of them was an internal error or the end of the engine.
"""

import math

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_d2f import register
from vllm_d2f.admission import check_sampling_params, end_tokens
from vllm_d2f.settings import request_params, served_settings


@pytest.fixture(scope="module")
def model():
    register()
    args = EngineArgs(model="d2f-tiny", dtype="float32", enforce_eager=True)
    return args.create_engine_config().model_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stop_token_ids=[-5]), r"stop_token_ids.*\[0, 2\*\*31 - 1\]"),
        (dict(stop_token_ids=[1 << 63]), "stop_token_ids"),
        (dict(stop_token_ids=[1 << 70]), "stop_token_ids"),
        (dict(seed=1 << 64), "seed"),
        (dict(logprobs=1, logprob_token_ids=[1 << 40]), "logprob_token_ids"),
        (dict(extra_args={"d2f_block_size": "9" * 5000}), "d2f_block_size must be a number"),
        (dict(extra_args={"d2f_block_size": "1_0"}), "d2f_block_size must be a number"),
        (dict(extra_args={"d2f_block_size": "\u0661"}), "d2f_block_size must be a number"),
        (dict(extra_args={"d2f_tau_conf": " 0.5 "}), "d2f_tau_conf must be a number"),
        (dict(extra_args={"d2f_tau_conf": "nan"}), "d2f_tau_conf must be a number"),
        (dict(extra_args={"d2f_tau_conf": "1e999"}), r"must be a number in \[0, 1\]"),
        (dict(extra_args={"d2f_tau_conf": math.nan}), r"must be a number in \[0, 1\]"),
    ],
)
def test_what_cannot_be_held_is_refused(model, options, message):
    with pytest.raises((VLLMValidationError, ValueError), match=message):
        check_sampling_params(SamplingParams(**options), model)


@pytest.mark.parametrize("rule", ["threshold", "frechet", "factor", "entropy", "leftmost"])
def test_rules_of_a_whole_block_have_no_order_of_the_text(model, rule):
    options = {"d2f_accept": rule, "d2f_tau_conf": 0.5}
    check_sampling_params(SamplingParams(extra_args=options), model)
    params = SamplingParams(extra_args=options, bad_words=["pens left"])
    if rule in ("threshold", "entropy", "leftmost"):
        return check_sampling_params(params, model)
    with pytest.raises(VLLMValidationError, match=f"d2f_accept {rule} .*threshold or entropy"):
        check_sampling_params(params, model)


def test_a_stop_token_that_does_not_exist_ends_nothing(model):
    """With min_tokens it was an index beyond the logits, which ended the engine."""
    beyond = model.get_vocab_size() + 5
    params = SamplingParams(stop_token_ids=[beyond, 7], min_tokens=4)
    check_sampling_params(params, model)
    assert 7 in end_tokens(params) and beyond not in params.stop_token_ids
    assert max(params.all_stop_token_ids) < model.get_vocab_size()


def test_more_candidates_than_tokens_are_no_limit(model):
    params = SamplingParams(temperature=1, top_k=1 << 70)
    check_sampling_params(params, model)
    assert params.top_k == model.get_vocab_size()


@pytest.mark.parametrize("text", ["0.5", "5e-1", ".5", "+0.5", "0.50"])
def test_numbers_may_come_as_texts(model, text):
    assert request_params(served_settings(model), {"d2f_tau_conf": text}).tau_conf == 0.5
