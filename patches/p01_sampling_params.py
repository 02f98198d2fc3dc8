# SPDX-License-Identifier: Apache-2.0
"""p01: D2F models check their own sampling parameters."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, is_d2f, patch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, StructuredOutputsConfig
    from vllm.sampling_params import SamplingParams

PARAMETERS = "vllm.sampling_params:SamplingParams._validate_diffusion"
STRUCTURED = "vllm.sampling_params:SamplingParams._validate_structured_outputs"


@patch(
    PARAMETERS,
    apply="process",
    why="vLLM refuses temperature != 1, seed, min_p, min_tokens, logit_bias, bad_words, "
    "allowed_token_ids and structured outputs for every diffusion model. D2F supports most of "
    "them, and checks them itself.",
    how="The two checks of vLLM call `check_sampling_params` and `check_structured_outputs` of "
    "`vllm_d2f.admission` for a D2F model; its grammar then goes through vLLM's own checks and "
    "`check_grammar`. For every other model the original runs.",
    upstream="none yet: vLLM lacks a hook by which a model declares the parameters it supports",
    remove_when="vLLM asks the model which sampling parameters it supports",
    written_against={PARAMETERS: "2fbdc056cf142309", STRUCTURED: "ebca6891dea0cd50"},
)
def p01_sampling_params(
    original: Original, self: "SamplingParams", model_config: "ModelConfig"
) -> None:
    from vllm_d2f.admission import check_sampling_params

    check = check_sampling_params if is_d2f(model_config) else original
    check(self, model_config)


@p01_sampling_params.also(STRUCTURED)
def _structured_outputs(
    original: Original,
    self: "SamplingParams",
    model_config: "ModelConfig",
    structured_outputs_config: "StructuredOutputsConfig | None",
    *args: Any,
) -> None:
    from vllm_d2f.admission import check_grammar, check_structured_outputs

    if self.structured_outputs is None or not is_d2f(model_config):
        return original(self, model_config, structured_outputs_config, *args)
    check_structured_outputs(self, model_config, structured_outputs_config)
    # The original asks the model one thing only: whether to refuse because it is a diffusion model.
    original(self, SimpleNamespace(is_diffusion=False), structured_outputs_config, *args)
    check_grammar(self.structured_outputs)
