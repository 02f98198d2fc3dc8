# SPDX-License-Identifier: Apache-2.0
"""What a request may ask of a D2F model: checked where vLLM admits it, so a wrong one is HTTP 400."""

from typing import TYPE_CHECKING

from vllm_d2f.settings import request_params, served_settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

__all__ = ["check_sampling_params"]


def check_sampling_params(params: "SamplingParams", model_config: "ModelConfig") -> None:
    """Refuse what D2F decoding cannot honour; name every end token of the model.

    Raises:
        VLLMValidationError: with the parameter's name and what is allowed.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        request_params(served_settings(model_config), params.extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None

    neutral = {
        "presence_penalty": (params.presence_penalty, 0.0),
        "frequency_penalty": (params.frequency_penalty, 0.0),
        "repetition_penalty": (params.repetition_penalty, 1.0),
        "min_tokens": (params.min_tokens, 0),
        "logit_bias": (params.logit_bias or None, None),
        "bad_words": (params.bad_words or None, None),
        "allowed_token_ids": (params.allowed_token_ids or None, None),
        "logprobs": (params.logprobs, None),
        "prompt_logprobs": (params.prompt_logprobs, None),
        "logprob_token_ids": (params.logprob_token_ids or None, None),
    }
    for name, (value, allowed) in neutral.items():
        if value != allowed:
            raise VLLMValidationError(
                f"{name} is not supported for D2F models yet; leave it at {allowed!r}.",
                parameter=name,
                value=value,
            )
    if not params.ignore_eos:
        # Some checkpoints end a turn with a token that generation_config.json does not list.
        stops = list(params.stop_token_ids or ())
        params.stop_token_ids = list(
            dict.fromkeys([*stops, *model_config.hf_config.end_token_ids])
        )
