# SPDX-License-Identifier: Apache-2.0
"""What this machine's processor has instructions for."""

import torch


def emulates(dtype: torch.dtype) -> bool:
    """Return whether matrix products in `dtype` run without instructions of their own.

    oneDNN, which computes them for torch and for vLLM, then has no kernel for the type. One token
    takes about as long as in float32, since most of the time goes into reading the weights, but
    every further position takes several times as long. Of a torch without oneDNN nothing is known.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not supported[dtype]()
