# SPDX-License-Identifier: Apache-2.0
"""p08: options beside the other fields count, removed fields are refused, the rest goes vLLM's way.

That a server installs it is tested over HTTP (tests/http/test_api_fields.py).
"""

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm_d2f.patches.p08_request_fields import PATCH, install
from vllm_d2f.patches.patch import function_of, source_hash

METHOD = "to_sampling_params"
REQUESTS = {
    CompletionRequest: {"prompt": "1"},
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "1"}]},
    ResponsesRequest: {"input": "1"},
}
CLASSES = pytest.mark.parametrize("kind", REQUESTS)


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own methods, and afterwards what was there before."""
    for kind in REQUESTS:
        monkeypatch.setattr(kind, METHOD, function_of(vars(kind)[METHOD]))


def params_of(kind, **fields):
    return kind(**REQUESTS[kind], **fields).to_sampling_params(16, {})


def test_it_was_written_against_this_vllm():
    for target, kind in zip(PATCH.target, REQUESTS, strict=True):
        assert source_hash(vars(kind)[METHOD]) == PATCH.source_sha256[target], target


@CLASSES
def test_options_beside_the_other_fields_count(kind):
    install()
    install()
    params = params_of(kind, d2f_preset="gsm8k", d2f_tau_conf=0.5, vllm_xargs={"d2f_trace": 1})
    assert params.extra_args == {"d2f_trace": 1, "d2f_preset": "gsm8k", "d2f_tau_conf": 0.5}
    assert not params_of(kind, d2f_tau_conf=None).extra_args


@CLASSES
def test_an_option_given_twice_is_refused(kind):
    install()
    with pytest.raises(VLLMValidationError, match="d2f_tau_conf stands in vllm_xargs and beside"):
        params_of(kind, d2f_tau_conf=0.5, vllm_xargs={"d2f_tau_conf": 0.9})


@CLASSES
def test_removed_fields_name_their_successor(kind):
    install()
    with pytest.raises(VLLMValidationError, match=r"guided_regex is not .*structured_outputs"):
        params_of(kind, guided_regex="[0-9]+")


@CLASSES
def test_everything_else_goes_the_stock_way(kind):
    fields = dict(temperature=0.5, seed=3, something_else=1, guided_json=None)
    before = params_of(kind, **fields)
    install()
    assert params_of(kind, **fields) == before


@CLASSES
def test_still_needed(kind):
    """Fails when vLLM refuses the removed fields or knows a plugin's: then delete p08."""
    params = params_of(kind, guided_regex="[0-9]+", d2f_tau_conf=0.5)
    assert params.structured_outputs is None and not params.extra_args
