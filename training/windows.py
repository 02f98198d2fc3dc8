# SPDX-License-Identifier: Apache-2.0
"""Windows: many states of a decoding beside one clean sequence.

A row of a batch holds the clean prompt and answer, and behind them windows of open blocks, each a
copy of the answer from a drawn block on:

    [ prompt | block 0 | block 1 | block 2 | ... ] [ window from block 1 ] [ window from block 4 ]

Only windows are noised. A window attends to itself and to the clean positions before it, which is
what the engine shows an open block: the KV cache of committed blocks, and the blocks before it. The
prompt, which is most of a row's cost, is computed once for all of them.

Shapes: B rows, T tokens of the clean sequence, K windows of a row, N blocks of a window, W tokens
of a window.
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor

from training.config import LossSection
from training.data import Batch


def with_windows(batch: Batch, options: LossSection, generator: Generator) -> Batch:
    """Put `options.windows` windows behind every row, which must hold one document."""
    B, T = batch.ids_BT.shape
    size, K = options.block_size, options.windows
    device = generator.device
    prompt_B1, end_B1 = batch.prompt_BT[:, :1], batch.end_BT[:, :1]
    begin_B1 = batch.begin_BT(size, options.block_origin)[:, :1]
    # The block of the first end token is the last in which a decoding can stand. Draws are
    # stratified, so that windows differ where there are enough blocks.
    blocks_B1 = (end_B1 - begin_B1).div(size, rounding_mode="floor") + 1
    draws_BK = torch.rand(B, K, generator=generator, device=device)
    start_BK = ((torch.arange(K, device=device) + draws_BK) / K * blocks_B1).long()
    first_BK1 = (begin_B1 + start_BK.minimum(blocks_B1 - 1) * size)[:, :, None]
    W = size * options.window_blocks
    position_BKW = first_BK1 + torch.arange(W, device=device)
    position_BX = position_BKW.flatten(1)
    behind_BX = position_BX >= T
    ids_BX = batch.ids_BT.gather(1, position_BX.clamp(max=T - 1)).masked_fill(behind_BX, batch.fill)
    document_B1 = batch.document_BT[:, :1]
    # An answer that was cut off says nothing about what would follow.
    length_B1 = (batch.document_BT >= 0).sum(1, keepdim=True)
    unknown_BX = (position_BX >= length_B1) & (end_B1 >= length_B1)
    index_BKW = T + torch.arange(K * W, device=device).view(K, W).expand(B, K, W) - 1
    index_BKW = torch.cat(((first_BK1 - 1).clamp(min=0), index_BKW[:, :, 1:]), 2)
    window_BKW = torch.arange(1, K + 1, device=device)[:, None].expand(B, K, W)

    def joined(clean_BT: Tensor, windows_BX: Tensor) -> Tensor:
        return torch.cat((clean_BT, windows_BX.expand(B, K * W)), 1)

    zeros_BT = torch.zeros_like(batch.position_BT)
    before_T = torch.arange(T, device=device) - 1
    return replace(
        batch,
        ids_BT=joined(batch.ids_BT, ids_BX),
        position_BT=joined(batch.position_BT, position_BX),
        document_BT=joined(
            batch.document_BT, document_B1.expand_as(position_BX).masked_fill(unknown_BX, -1)
        ),
        prompt_BT=joined(batch.prompt_BT, prompt_B1),
        end_BT=joined(batch.end_BT, end_B1),
        window_BT=joined(zeros_BT, window_BKW.flatten(1)),
        first_BT=joined(zeros_BT, first_BK1.expand_as(position_BKW).flatten(1)),
        before_BT=joined(before_T.expand(B, T), index_BKW.flatten(1)),
    )
