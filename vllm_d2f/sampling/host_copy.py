# SPDX-License-Identifier: Apache-2.0
"""Tensors on their way from the host to a device.

vLLM has the same (`async_tensor_h2d`); what imports this is used without vLLM too.
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on `device`; the host does not wait for the copy.

    Out of memory that may be paged out the driver copies while the host waits, so a device gets it
    from pinned memory, which PyTorch keeps until the copy is done.
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
