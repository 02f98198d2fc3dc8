# SPDX-License-Identifier: Apache-2.0
"""The undecided positions of a batch without waiting for the device.

`Tensor.nonzero` copies its number of rows to the host, and the host waits for the whole forward.
The host knows an upper bound, the positions of all windows, so the list is padded to it instead.
Padding costs rows of the language-model head; while these are few the head is bound by reading its
weights and they are free.

Shape suffixes: D requests, W window positions, N rows of the list, padding included.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MaskedRows(NamedTuple):
    """Positions in row order, then padding: the last request's first position, which is in every
    forward (its last one need not be, windows may be narrower than W).

    Attributes:
        request_N, column_N: int64.
        target_N: int64, request * W + column, and D * W for padding: see `scatter`.
    """

    request_N: Tensor
    column_N: Tensor
    target_N: Tensor


def masked_rows(masked_DW: Tensor, bound: int, buffer: Tensor) -> MaskedRows:
    """List the true entries.

    Args:
        masked_DW: bool.
        bound: the length of the list, at least as many as are true.
        buffer: int64, at least `bound + 1` long, overwritten; results are views of it or new.

    Raises:
        ValueError: if the buffer is too short.
    """
    if len(buffer) <= bound:
        raise ValueError(f"a buffer of {len(buffer)} for {bound} rows and one more")
    size = masked_DW.numel()
    masked_P = masked_DW.flatten()
    # The rank of each true entry is its place in the list; all others go to one place after it.
    place_P = torch.where(masked_P, masked_P.cumsum(0) - 1, bound).clamp_(max=bound)
    target_N = buffer[: bound + 1].fill_(size)
    target_N.scatter_(0, place_P, torch.arange(size, device=masked_DW.device))
    target_N = target_N[:bound]
    width = masked_DW.shape[1]
    position_N = torch.where(target_N == size, size - width, target_N)
    return MaskedRows(position_N // width, position_N % width, target_N)


def scatter(rows: MaskedRows, values_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values of the rows at their positions [D, W], zero elsewhere; padding is dropped."""
    out = values_N.new_zeros(shape[0] * shape[1] + 1)
    out.scatter_(0, rows.target_N, values_N)
    return out[:-1].view(shape)
