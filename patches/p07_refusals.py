# SPDX-License-Identifier: Apache-2.0
"""p07 and p11: vLLM refuses beam search and prompts in pieces for D2F models."""

from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, is_d2f, patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

BEAM_SEARCH = "vllm.config.vllm:VllmConfig._check_supports_watermarking"
STREAMED_INPUT = "vllm.v1.engine.async_llm:AsyncLLM._add_streaming_input_request"


@patch(
    BEAM_SEARCH,
    apply="process",
    why="vLLM's beam search asks for one token at a time and appends it to the prompt. A D2F "
    "prompt is one bidirectional block, so beam search would silently score other probabilities "
    "than those that D2F decodes with.",
    how="vLLM calls this check at the start of every beam search: for a D2F model it is an error "
    "that names the remedy. Every other call goes to the original.",
    upstream="none yet: vLLM does not refuse beam search for diffusion models",
    remove_when="vLLM refuses beam search for diffusion models",
    written_against={BEAM_SEARCH: "63a4979b48653559"},
)
def p07_beam_search(
    original: Original, self: "VllmConfig", config: Any = None, **kwargs: Any
) -> bool:
    # No other function sees both the parameters of a beam search and the model.
    if type(config).__name__ == "BeamSearchParams" and is_d2f(self.model_config):
        from vllm_d2f.request_fields import refuse

        refuse(
            "use_beam_search",
            "beam search is not supported for D2F models: they decode several tokens per "
            "forward, in any order. Remove use_beam_search; for several answers use n.",
        )
    return original(self, config, **kwargs)


@patch(
    STREAMED_INPUT,
    apply="server",
    why="`AsyncLLM.generate` takes an async generator as a prompt and appends each piece to a "
    "running session. A D2F request's window lives in the worker until the request ends, and a "
    "session does not end between two pieces: the next answer would begin in the old window.",
    how="The method that starts such a session raises vLLM's validation error for a D2F model, "
    "before anything is sent to the engine. For other models the original runs.",
    upstream="vLLM refuses it for pooling models, n > 1 and stop strings in the same place",
    remove_when="vLLM refuses streamed input for diffusion models, or D2F windows can be reopened",
    written_against={STREAMED_INPUT: "0c7d0fd89495b10c"},
)
async def p11_streamed_input(
    original: Original, self: "AsyncLLM", *args: Any, **kwargs: Any
) -> Any:
    if is_d2f(self.model_config):
        from vllm_d2f.request_fields import refuse

        refuse(
            "prompt",
            "a prompt in pieces (an async generator) is not supported for D2F models: the answer "
            "to the first piece would become part of the prompt of the next. Send the whole "
            "prompt at once",
        )
    return await original(self, *args, **kwargs)
