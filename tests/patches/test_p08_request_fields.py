# SPDX-License-Identifier: Apache-2.0
"""p08: options beside the other fields count, removed fields are refused, the rest goes vLLM's way.

That a server installs it is tested over HTTP (tests/http/test_api_fields.py).
"""

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers import app as launcher
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm_d2f.patches.p08_request_fields import p08_request_fields as PATCH
from vllm_d2f.patches.patch import configs, function_of, source_hash

METHOD = "to_sampling_params"
REQUESTS = {
    CompletionRequest: {"prompt": "1"},
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "1"}]},
    ResponsesRequest: {"input": "1"},
}
CLASSES = pytest.mark.parametrize("kind", REQUESTS)


@pytest.fixture(scope="module")
def served():
    """The configuration of a server of d2f-tiny."""
    options = dict(dtype="float32", enforce_eager=True, max_model_len=256)
    return EngineArgs(model="d2f-tiny", **options).create_engine_config()


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own methods, and afterwards what was there before."""
    monkeypatch.delitem(configs, "server", raising=False)
    middleware = function_of(launcher.init_entrypoints_middleware)
    monkeypatch.setattr(launcher, "init_entrypoints_middleware", middleware)
    for kind in REQUESTS:
        monkeypatch.setattr(kind, METHOD, function_of(vars(kind)[METHOD]))


@pytest.fixture
def install(served, monkeypatch):
    def install_for_the_server() -> None:
        monkeypatch.setitem(configs, "server", served)
        PATCH.install()

    return install_for_the_server


def params_of(kind, defaults=None, **fields):
    return kind(**REQUESTS[kind], **fields).to_sampling_params(16, defaults or {})


def test_it_was_written_against_this_vllm():
    *methods, middleware = PATCH.replacements
    for target, kind in zip(methods, REQUESTS, strict=True):
        assert source_hash(vars(kind)[METHOD]) == PATCH.written_against[target], target
    found = source_hash(launcher.init_entrypoints_middleware)
    assert found == PATCH.written_against[middleware]


@CLASSES
def test_options_beside_the_other_fields_count(kind, install):
    install()
    install()
    params = params_of(kind, d2f_preset="gsm8k", d2f_tau_conf=0.5, vllm_xargs={"d2f_trace": 1})
    assert params.extra_args == {"d2f_trace": 1, "d2f_preset": "gsm8k", "d2f_tau_conf": 0.5}
    assert not params_of(kind, d2f_tau_conf=None).extra_args


@CLASSES
def test_an_option_given_twice_is_refused(kind, install):
    install()
    with pytest.raises(VLLMValidationError, match="d2f_tau_conf stands in vllm_xargs and beside"):
        params_of(kind, d2f_tau_conf=0.5, vllm_xargs={"d2f_tau_conf": 0.9})


@CLASSES
def test_removed_fields_name_their_successor(kind, install):
    install()
    with pytest.raises(VLLMValidationError, match=r"guided_regex is not .*structured_outputs"):
        params_of(kind, guided_regex="[0-9]+")


@CLASSES
def test_everything_else_goes_the_stock_way(kind, install):
    fields = dict(temperature=0.5, seed=3, something_else=1, guided_json=None)
    before = params_of(kind, **fields)
    install()
    assert params_of(kind, **fields) == before


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_several_answers_need_a_temperature_and_the_message_says_so(kind, install):
    """vLLM's own message does not say that greedy is the default of the model."""
    install()
    with pytest.raises(VLLMValidationError, match='default temperature .* is 0.*"temperature"'):
        params_of(kind, {"temperature": 0.0}, n=2)
    assert params_of(kind, {"temperature": 0.0}, n=2, temperature=0.7).n == 2
    assert params_of(kind, {"temperature": 0.7}, n=2).n == 2


BAD = {
    "option": ({"vllm_xargs": {"d2f_tau_conf": 1.5}}, "d2f_tau_conf"),
    "beside": ({"d2f_tau_conf": 1.5}, "d2f_tau_conf"),
    "bias": ({"logit_bias": {"100000": 1}}, "logit_bias|out-of-vocab"),
}


@CLASSES
@pytest.mark.parametrize("what", BAD)
def test_bad_parameters_of_a_stream_are_refused_before_it_begins(kind, install, what):
    fields, named = BAD[what]
    if "logit_bias" in fields and kind is ResponsesRequest:
        pytest.skip("the API has no logit_bias")
    params_of(kind, **{k: v for k, v in fields.items() if k != "d2f_tau_conf"}, stream=True)
    install()
    with pytest.raises(VLLMValidationError, match=named):
        params_of(kind, **fields, stream=True)
    params_of(kind, **fields)  # not streamed: the engine's front end refuses it in time


def test_a_checked_stream_is_as_without_the_check(install):
    """Grammars too, though vLLM's check writes into them."""
    fields = dict(stream=True, temperature=0.5, structured_outputs={"regex": "[0-9]+"})
    before = params_of(CompletionRequest, **fields)
    install()
    after = params_of(CompletionRequest, **fields)
    assert after == before and after.structured_outputs._backend is None
    with pytest.raises(VLLMValidationError, match="regex"):
        params_of(CompletionRequest, stream=True, structured_outputs={"regex": "("})


@CLASSES
def test_still_needed(kind):
    """Fails when vLLM refuses the removed fields or knows a plugin's: then delete p08."""
    params = params_of(kind, guided_regex="[0-9]+", d2f_tau_conf=0.5)
    assert params.structured_outputs is None and not params.extra_args
