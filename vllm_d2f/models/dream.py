# SPDX-License-Identifier: Apache-2.0
"""Dream: vLLM's Qwen2 stack. Tensor names and layers are Qwen2's, so nothing is added."""

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_d2f.worker.model import D2FModel

__all__ = ["DreamForD2F"]


class DreamForD2F(D2FModel, Qwen2ForCausalLM):
    """Architecture `DreamModel`. Position i is predicted by the output at i - 1."""
