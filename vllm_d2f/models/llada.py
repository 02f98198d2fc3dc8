# SPDX-License-Identifier: Apache-2.0
"""LLaDA: vLLM's Llama stack behind OLMo's tensor names."""

from collections.abc import Iterable

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_d2f.models.olmo_names import LLAMA_OF_OLMO
from vllm_d2f.worker.model import D2FModel

__all__ = ["OLMO_TO_LLAMA", "LLaDAForD2F"]

OLMO_TO_LLAMA = WeightsMapper(orig_to_new_regex=dict(LLAMA_OF_OLMO))


class LLaDAForD2F(D2FModel, LlamaForCausalLM):  # type: ignore[misc]
    """Architecture `LLaDAModelLM`. Position i is predicted by the output at i."""

    hf_to_vllm_mapper = OLMO_TO_LLAMA | LlamaForCausalLM.hf_to_vllm_mapper

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load OLMo-named tensors; Llama-named ones pass unchanged."""
        # The inner model stacks q/k/v and gate/up itself, so only the renames are applied here.
        return AutoWeightsLoader(self).load_weights(weights, mapper=OLMO_TO_LLAMA)
