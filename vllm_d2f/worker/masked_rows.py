# SPDX-License-Identifier: Apache-2.0
"""The undecided positions of a batch without waiting for the device.

`Tensor.nonzero` copies its number of rows to the host, and the host waits for the whole forward.
The host knows an upper bound for each request, so the list is padded to these instead: which rows
are whose is then known on the host. Padding costs rows of the language-model head; while these are
few the head is bound by reading its weights and they are free.

Shape suffixes: D requests, W window positions, N rows of the list, padding included.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_d2f.sampling.host_copy import to_device


class MaskedRows(NamedTuple):
    """Request by request its positions in order, then padding: its first position, which is in
    every forward (its last one need not be, windows may be narrower than W).

    Attributes:
        request_N, column_N: int64, the first ascending.
        target_N: int64, request * W + column, and D * W for padding: see `scatter`.
    """

    request_N: Tensor
    column_N: Tensor
    target_N: Tensor


def masked_rows(
    masked_DW: Tensor, bound_D: NDArray[np.int64], multiple: int, buffer: Tensor
) -> MaskedRows:
    """List the true entries.

    Args:
        masked_DW: bool, of one request or more.
        bound_D: rows per request, at least as many as are true, at most W.
        multiple: the last request gets more rows until all are a multiple of this, and not none.
        buffer: int64, longer than the list, overwritten; results are views of it or new.

    Raises:
        ValueError: if the buffer is too short.
    """
    num_requests, width = masked_DW.shape
    num_rows = -(-max(int(bound_D.sum()), 1) // multiple) * multiple
    if len(buffer) <= num_rows:
        raise ValueError(f"a buffer of {len(buffer)} for {num_rows} rows and one more")
    # One copy for both: what begins where, and whose each row is.
    known = np.full(num_requests + num_rows, num_requests - 1, dtype=np.int64)
    known[0] = 0
    np.cumsum(bound_D[:-1], out=known[1:num_requests])
    owner = np.repeat(np.arange(num_requests), bound_D)
    known[num_requests : num_requests + len(owner)] = owner
    begin_D, request_N = to_device(torch.from_numpy(known), masked_DW.device).split(
        [num_requests, num_rows]
    )
    # The rank of each true entry is its place in the list; all others go to one place after it.
    place_DW = begin_D[:, None] + masked_DW.cumsum(1) - 1
    place_DW = torch.where(masked_DW, place_DW, num_rows).clamp_(max=num_rows)
    size = num_requests * width
    target_N = buffer[: num_rows + 1].fill_(size)
    target_N.scatter_(0, place_DW.flatten(), torch.arange(size, device=masked_DW.device))
    target_N = target_N[:num_rows]
    column_N = torch.where(target_N == size, 0, target_N - request_N * width)
    return MaskedRows(request_N, column_N, target_N)


def scatter(rows: MaskedRows, values_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values of the rows at their positions [D, W], zero elsewhere; padding is dropped."""
    out = values_N.new_zeros(shape[0] * shape[1] + 1)
    out.scatter_(0, rows.target_N, values_N)
    return out[:-1].view(shape)
