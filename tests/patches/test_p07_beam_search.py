# SPDX-License-Identifier: Apache-2.0
"""p07: beam search is refused for D2F models, and vLLM's own check runs for everybody."""

from types import SimpleNamespace

import pytest
from vllm.config.vllm import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm_d2f.patches.p07_refusals import BEAM_SEARCH, p07_beam_search
from vllm_d2f.patches.patch import function_of, source_hash

METHOD = "_check_supports_watermarking"
BEAMS = BeamSearchParams(beam_width=2, max_tokens=4)


def config_of(architecture: str) -> SimpleNamespace:
    """Return what the method reads of a configuration."""
    return SimpleNamespace(
        watermark_config=None, model_config=SimpleNamespace(architectures=[architecture])
    )


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    stock = function_of(vars(VllmConfig)[METHOD])
    monkeypatch.setattr(VllmConfig, METHOD, stock)
    p07_beam_search.install()
    p07_beam_search.install()
    return vars(VllmConfig)[METHOD]


def test_it_was_written_against_this_vllm():
    found = source_hash(vars(VllmConfig)[METHOD])
    assert found == p07_beam_search.written_against[BEAM_SEARCH]


def test_d2f_models_refuse(check):
    with pytest.raises(VLLMValidationError, match="beam search is not supported.*use n"):
        check(config_of("DreamModel"), BEAMS)


def test_others_and_other_requests_keep_stock_behaviour(check):
    assert check(config_of("Qwen2ForCausalLM"), BEAMS) is False
    assert check(config_of("DreamModel"), SamplingParams()) is False
    assert check(config_of("DreamModel")) is False
    assert check(config_of("DreamModel"), custom_sampler=True) is False


def test_still_needed():
    """Fails when vLLM refuses it for diffusion models: then delete p07."""
    stock = function_of(vars(VllmConfig)[METHOD])
    assert stock(config_of("DreamModel"), BEAMS) is False
