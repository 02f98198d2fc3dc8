# SPDX-License-Identifier: Apache-2.0
"""p01: D2F models judge their sampling parameters, others are judged by vLLM."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm_d2f.patches.p01_sampling_params import PATCH, apply
from vllm_d2f.patches.patch import function_of, source_hash

D2F = SimpleNamespace(is_diffusion=True, is_d2f=True)
OTHER_DIFFUSION = SimpleNamespace(is_diffusion=True, is_d2f=False)
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
    settings = ModuleType("vllm_d2f.settings")
    settings.is_d2f = lambda model_config: model_config.is_d2f
    settings.check_sampling_params = lambda params, model_config: seen.append(params)
    monkeypatch.setitem(sys.modules, "vllm_d2f.settings", settings)
    stock = function_of(vars(SamplingParams)["_validate_diffusion"])
    monkeypatch.setattr(SamplingParams, "_validate_diffusion", stock)
    apply()
    apply()
    return seen


def test_it_was_written_against_this_vllm():
    (target,) = PATCH.target
    found = source_hash(vars(SamplingParams)["_validate_diffusion"])
    assert found == PATCH.source_sha256[target], "read what changed upstream, then renew the hash"


@pytest.mark.parametrize("name", REFUSED_BY_VLLM)
def test_a_d2f_model_judges_its_parameters(asked: list, name: str):
    params = SamplingParams(**{name: REFUSED_BY_VLLM[name]})
    params._validate_diffusion(D2F)
    assert asked == [params]


def test_our_refusal_reaches_the_caller(asked: list, monkeypatch: pytest.MonkeyPatch):
    def refuse(params: SamplingParams, model_config: object) -> None:
        raise VLLMValidationError("no", parameter="d2f_tau_act")

    monkeypatch.setattr(sys.modules["vllm_d2f.settings"], "check_sampling_params", refuse)
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
