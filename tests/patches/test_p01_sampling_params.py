# SPDX-License-Identifier: Apache-2.0
"""p01: D2F models judge their sampling parameters, others are judged by vLLM."""

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm_d2f.patches.p01_sampling_params import p01_sampling_params as PATCH
from vllm_d2f.patches.patch import function_of, source_hash

from vllm_d2f import admission, settings

D2F = SimpleNamespace(is_diffusion=True, is_d2f=True)
OTHER_DIFFUSION = SimpleNamespace(is_diffusion=True, is_d2f=False)
METHODS = ("_validate_diffusion", "_validate_structured_outputs")
AUTOREGRESSIVE = SimpleNamespace(is_diffusion=False, is_d2f=False)

REFUSED_BY_VLLM = {
    "temperature": 0.0,
    "min_p": 0.1,
    "seed": 1,
    "min_tokens": 1,
    "logit_bias": {1: 1.0},
    "bad_words": ["x"],
    "allowed_token_ids": [1],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """Applies the patch for one test; the parameters our own check was asked about."""
    seen: list = []
    monkeypatch.setattr(settings, "is_d2f", lambda model_config: model_config.is_d2f)
    for name in ("check_sampling_params", "check_structured_outputs"):
        monkeypatch.setattr(admission, name, lambda params, *rest: seen.append(params))
    for name in METHODS:
        monkeypatch.setattr(SamplingParams, name, function_of(vars(SamplingParams)[name]))
    PATCH.install()
    PATCH.install()
    return seen


def test_it_was_written_against_this_vllm():
    for target, name in zip(PATCH.replacements, METHODS, strict=True):
        found = source_hash(vars(SamplingParams)[name])
        expected = PATCH.written_against[target]
        assert found == expected, "read what changed upstream, then renew the hash"


@pytest.mark.parametrize("name", REFUSED_BY_VLLM)
def test_a_d2f_model_judges_its_parameters(asked: list, name: str):
    params = SamplingParams(**{name: REFUSED_BY_VLLM[name]})
    params._validate_diffusion(D2F)
    assert asked == [params]


def test_our_refusal_reaches_the_caller(asked: list, monkeypatch: pytest.MonkeyPatch):
    def refuse(params: SamplingParams, model_config: object) -> None:
        raise VLLMValidationError("no", parameter="d2f_tau_act")

    monkeypatch.setattr(admission, "check_sampling_params", refuse)
    with pytest.raises(VLLMValidationError, match="no"):
        SamplingParams()._validate_diffusion(D2F)


@pytest.mark.parametrize("name", REFUSED_BY_VLLM)
def test_other_models_keep_stock_behaviour(asked: list, name: str):
    params = SamplingParams(**{name: REFUSED_BY_VLLM[name]})
    params._validate_diffusion(AUTOREGRESSIVE)
    with pytest.raises(VLLMValidationError, match="not yet supported with diffusion models"):
        params._validate_diffusion(OTHER_DIFFUSION)
    assert asked == []


@pytest.mark.parametrize("name", REFUSED_BY_VLLM)
def test_still_needed(name: str):
    """Fails when vLLM accepts one of these for diffusion models: then shrink or delete p01."""
    stock = function_of(vars(SamplingParams)["_validate_diffusion"])
    with pytest.raises(VLLMValidationError):
        stock(SamplingParams(**{name: REFUSED_BY_VLLM[name]}), OTHER_DIFFUSION)


CONFIG = SimpleNamespace(backend="xgrammar")


def structured(**constraint) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))


def test_a_d2f_models_grammar_is_judged_by_us_and_by_vllm(asked: list):
    good, bad = structured(regex="[0-9]+"), structured(regex="([0-9]")
    good._validate_structured_outputs(D2F, CONFIG, object())
    assert asked == [good]
    assert good.structured_outputs._backend == "xgrammar"
    with pytest.raises(VLLMValidationError, match="regex"):
        bad._validate_structured_outputs(D2F, CONFIG, object())


def test_who_has_no_grammar_is_not_asked(asked: list):
    SamplingParams()._validate_structured_outputs(D2F, CONFIG, object())
    assert asked == []


def test_grammars_of_other_models_keep_stock_behaviour(asked: list):
    structured(regex="[0-9]+")._validate_structured_outputs(AUTOREGRESSIVE, CONFIG, object())
    with pytest.raises(VLLMValidationError, match="not yet supported for diffusion"):
        structured(regex="[0-9]+")._validate_structured_outputs(OTHER_DIFFUSION, CONFIG, object())
    assert asked == []


def test_structured_outputs_still_need_it():
    """Fails when vLLM accepts grammars for diffusion models: then delete that half of p01."""
    stock = function_of(vars(SamplingParams)["_validate_structured_outputs"])
    with pytest.raises(VLLMValidationError, match="not yet supported for diffusion"):
        stock(structured(regex="[0-9]+"), OTHER_DIFFUSION, CONFIG, object())
