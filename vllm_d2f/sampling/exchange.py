# SPDX-License-Identifier: Apache-2.0
"""What each tensor-parallel rank says, in one gather.

Shape suffixes: N rows, P ranks, C columns of an exchange.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""int32 [N, C] of this rank -> [P, N, C] of all of them, in the order of their tokens."""


def exchange(values: tuple[Tensor, ...], gather: Gather) -> tuple[Tensor, ...]:
    """Every rank's values: [P, N] of each [N], [P, N, C] of each [N, C]. Their bits travel."""
    columns = [value.contiguous().view(torch.int32).view(len(value), -1) for value in values]
    widths = [column.shape[1] for column in columns]
    parts = gather(torch.cat(columns, 1)).split(widths, dim=-1)
    return tuple(
        part.contiguous().view(value.dtype).view(-1, *value.shape)
        for part, value in zip(parts, values, strict=True)
    )
