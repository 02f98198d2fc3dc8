# SPDX-License-Identifier: Apache-2.0
"""Block-causal attention: a batch as sequences, and the backend that runs them on CUDA."""

from vllm_d2f.blocks import NO_PROMPT_END, VirtualSequences, virtual_sequences

__all__ = ["NO_PROMPT_END", "VirtualSequences", "virtual_sequences"]
