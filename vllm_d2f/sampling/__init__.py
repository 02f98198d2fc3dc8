# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, for CUDA. Nothing here is needed, or imported, on a CPU."""

from importlib.util import find_spec

import torch


def missing(device: torch.device | str) -> str | None:
    """What keeps the kernels from running on a device, with the remedy; None if nothing does."""
    if torch.device(device).type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device}; use vllm_d2f.sampling.sample"
    if find_spec("triton") is None:
        return "the kernels need Triton: pip install triton"
    return None
