# SPDX-License-Identifier: Apache-2.0
"""p07: refuse beam search for D2F models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_d2f.patches.patch import Patch, replace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import BeamSearchParams, SamplingParams

NAME = "p07_beam_search"
TARGET = "vllm.config.vllm:VllmConfig._check_supports_watermarking"


def _make(original: Callable[..., bool]) -> Callable[..., bool]:
    def _check_supports_watermarking(
        self: VllmConfig,
        config: SamplingParams | BeamSearchParams | None = None,
        *,
        custom_sampler: bool = False,
    ) -> bool:
        # Called for every beam search, and nothing else that sees its parameters knows the model.
        if config is not None and type(config).__name__ == "BeamSearchParams":
            from vllm.exceptions import VLLMValidationError

            from vllm_d2f.settings import is_d2f

            if self.model_config is not None and is_d2f(self.model_config):
                raise VLLMValidationError(
                    "beam search is not supported for D2F models: they decide several tokens per "
                    "forward, in any order. Remove use_beam_search; for several answers use n.",
                    parameter="use_beam_search",
                )
        return original(self, config, custom_sampler=custom_sampler)

    return _check_supports_watermarking


def apply() -> None:
    """Install the patch; a second call does nothing."""
    replace(NAME, TARGET, _make)


def needed() -> bool:
    """Always: vLLM offers beam search for every generating model."""
    return True


PATCH = Patch(
    name=NAME,
    target=(TARGET,),
    why="vLLM's beam search asks for one token at a time and makes it part of the prompt. A D2F "
    "prompt is one bidirectional block, so that scores something else than what D2F decodes, "
    "without a word.",
    how="Wraps the check that vLLM makes at the start of every beam search: for a D2F model it is "
    "an error that names the remedy. Every other call goes to the original.",
    upstream="none yet: wanted is that diffusion models refuse beam search",
    remove_when="vLLM refuses beam search for diffusion models",
    when="always",
    source_sha256={
        TARGET: "63a4979b486535592d24c419e25b36360fd0ac6e3ab6fe1b14ea70ac2cce0573",
    },
    apply=apply,
    needed=needed,
)
