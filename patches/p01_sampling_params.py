# SPDX-License-Identifier: Apache-2.0
"""p01: let D2F models check their own sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Patch, replace

if TYPE_CHECKING:
    from vllm.config import ModelConfig, StructuredOutputsConfig
    from vllm.sampling_params import SamplingParams
    from vllm.tokenizers import TokenizerLike

NAME = "p01_sampling_params"
TARGET = "vllm.sampling_params:SamplingParams._validate_diffusion"
STRUCTURED = "vllm.sampling_params:SamplingParams._validate_structured_outputs"


def _make(original: Callable[..., None]) -> Callable[..., None]:
    def _validate_diffusion(self: SamplingParams, model_config: ModelConfig) -> None:
        from vllm_d2f.admission import check_sampling_params
        from vllm_d2f.settings import is_d2f

        if is_d2f(model_config):
            check_sampling_params(self, model_config)
        else:
            original(self, model_config)

    return _validate_diffusion


def _make_structured(original: Callable[..., None]) -> Callable[..., None]:
    def _validate_structured_outputs(
        self: SamplingParams,
        model_config: ModelConfig,
        structured_outputs_config: StructuredOutputsConfig | None,
        tokenizer: TokenizerLike | None,
    ) -> None:
        from vllm_d2f.admission import check_grammar, check_structured_outputs
        from vllm_d2f.settings import is_d2f

        seen: Any = model_config
        # None for every model that is not ours.
        structured = None
        if self.structured_outputs is not None and is_d2f(model_config):
            structured = self.structured_outputs
        if structured is not None:
            check_structured_outputs(self, model_config, structured_outputs_config)
            # All that vLLM asks the model here is whether to refuse.
            seen = SimpleNamespace(is_diffusion=False)
        original(self, seen, structured_outputs_config, tokenizer)
        if structured is not None:
            check_grammar(structured)

    return _validate_structured_outputs


def apply() -> None:
    """Install the patch; a second call does nothing."""
    replace(NAME, TARGET, _make)
    replace(NAME, STRUCTURED, _make_structured)


def needed() -> bool:
    """Always: vLLM has no way for a model to declare its sampling parameters."""
    return True


PATCH = Patch(
    name=NAME,
    target=(TARGET, STRUCTURED),
    why="vLLM refuses temperature != 1, seed, min_p, min_tokens, logit_bias, bad_words, "
    "allowed_token_ids and structured outputs for every diffusion model. D2F supports or judges "
    "them itself.",
    how="Wraps the methods: a D2F model goes to `vllm_d2f.admission.check_sampling_params` and "
    "`check_structured_outputs`, and its grammar to vLLM's own checks; every other model to the "
    "original.",
    upstream="none yet: wanted is a hook on the model class that declares supported parameters",
    remove_when="vLLM asks the model which sampling parameters it supports",
    when="always",
    source_sha256={
        TARGET: "2fbdc056cf1423098bf6dbe34fe9132ac8d9f0f5f079e144da7afbbcaa17494d",
        STRUCTURED: "ebca6891dea0cd50675ffa3ca809c213ed2893dcf960591fe80ab0b20e52ff29",
    },
    apply=apply,
    needed=needed,
)
