# SPDX-License-Identifier: Apache-2.0
"""The masked positions of a batch as a list of rows, with or without waiting for the device.

`exact_rows` asks the device how many there are, so on CUDA the host would wait for the whole
forward. `bounded_rows` pads the list to an upper bound for each request (`MaskedBounds`), so the
host knows which rows belong to which request. Padding costs rows of the language-model head. While
these are few, the head is bound by reading its weights, and the padding is free.

Shape suffixes: D requests, W window positions, N rows of the list, padding included.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d


class MaskedRows(NamedTuple):
    """Request by request its masked positions in order, then its padding.

    Padding repeats the first position of the window, which is part of every forward (the last one
    need not be, since a query may be narrower than W).

    Attributes:
        request_N, column_N: int64, the first ascending.
        target_N: int64, request * W + column, and D * W for padding; see `scatter`.
    """

    request_N: Tensor
    column_N: Tensor
    target_N: Tensor


def exact_rows(masked_DW: Tensor) -> MaskedRows:
    """List the true entries, without padding. The host waits for the device."""
    request_N, column_N = masked_DW.nonzero(as_tuple=True)
    return MaskedRows(request_N, column_N, request_N * masked_DW.shape[1] + column_N)


def bounded_rows(
    masked_DW: Tensor, bound_D: NDArray[np.int64], multiple: int, buffer: Tensor
) -> MaskedRows:
    """List the true entries, with padding. The host does not wait.

    Args:
        masked_DW: bool, of one request or more.
        bound_D: rows per request, at least as many as are true, at most W.
        multiple: the last request gets more rows until the list is a multiple of this, and not
            empty.
        buffer: int64, longer than the list; overwritten. Results are views of it, or new.

    Raises:
        ValueError: the buffer is too short.
    """
    num_requests, width = masked_DW.shape
    num_rows = -(-max(int(bound_D.sum()), 1) // multiple) * multiple
    if len(buffer) <= num_rows:
        raise ValueError(f"a buffer of {len(buffer)} for {num_rows} rows and one more")
    # One copy for both: where the rows of each request begin, and which request each row is of.
    known = np.full(num_requests + num_rows, num_requests - 1, dtype=np.int64)
    known[0] = 0
    np.cumsum(bound_D[:-1], out=known[1:num_requests])
    owner = np.repeat(np.arange(num_requests), bound_D)
    known[num_requests : num_requests + len(owner)] = owner
    begin_D, request_N = async_tensor_h2d(known, device=masked_DW.device).split(
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
    """Put the values of the rows at their positions [D, W]; zero elsewhere. Padding is dropped."""
    out = values_N.new_zeros(shape[0] * shape[1] + 1)
    out.scatter_(0, rows.target_N, values_N)
    return out[:-1].view(shape)
