# SPDX-License-Identifier: Apache-2.0
"""From logits to a token and its probability. The Triton kernel is imported on CUDA only."""

from importlib.util import find_spec

import torch


def missing(device: torch.device | str) -> str | None:
    """Say why the Triton kernels cannot run on a device, with the remedy; None if they can."""
    if torch.device(device).type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device}; use vllm_d2f.sampling.sample"
    if find_spec("triton") is None:
        return "the kernels need Triton: pip install triton"
    return None
