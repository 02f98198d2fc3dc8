# SPDX-License-Identifier: Apache-2.0
"""numpy versions of methods of vLLM's V2 block tables and staged writer (installed by p03)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor

PAD_SLOT_ID = -1  # vllm.v1.attention.backends.utils.PAD_SLOT_ID; a test compares


def gather_block_tables(
    self: BlockTables,
    idx_mapping: Tensor,
    num_reqs_padded: int,
    out: tuple[Tensor, ...] | None = None,
    out_ptrs: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the block tables of the batch rows; padded rows are zero.

    As in the kernel, the entries behind a request's last block keep values of earlier steps.
    vLLM 0.33 added `num_computed_tokens`, for sliding windows, which no D2F model has.
    """
    state = idx_mapping.numpy()
    num_reqs = len(state)
    targets = tuple(self.input_block_tables) if out is None else out
    num_blocks = self.num_blocks.gpu.numpy()
    for group, target in enumerate(targets):
        width = num_blocks[group, state].max(initial=0)
        table = target.numpy()
        table[:num_reqs, :width] = self.block_tables[group].gpu.numpy()[state, :width]
        table[num_reqs:num_reqs_padded] = 0
    return tuple(target[:num_reqs_padded] for target in targets)


def compute_slot_mappings(
    self: BlockTables,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    num_tokens_padded: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return the KV cache slot of each token: PAD behind the last token and in unused rows."""
    if self.cp_size != 1:
        raise NotImplementedError("context parallelism has no CPU version in vllm-d2f")
    result = self.slot_mappings if out is None else out
    slots = result.numpy()
    state = idx_mapping.numpy()
    bounds = query_start_loc.numpy()[: len(state) + 1]
    first, last = bounds[0], bounds[-1]
    row = np.arange(len(state)).repeat(bounds[1:] - bounds[:-1])
    owner = state[row]
    absent = state < 0  # an unused row; it reads another request's table below and then gets PAD
    position = positions.numpy()[first:last]
    enabled = self.slot_mapping_enabled.numpy()
    for group, size in enumerate(self.block_sizes):
        slots[group, last:] = PAD_SLOT_ID
        if not enabled[group]:
            slots[group, first:last] = PAD_SLOT_ID
            continue
        block = position // size
        number = self.block_tables[group].gpu.numpy()[owner, block]
        # number * size + position % size, without a second division.
        slots[group, first:last] = (number - block) * size + position
        if absent.any():
            slots[group, first:last][absent[row]] = PAD_SLOT_ID
    return result[:, :num_tokens_padded]


def apply_fused(
    self: FusedStagedWriter,
    tensors: Sequence[StagedWriteTensor],
    output_ptrs: Tensor,
    output_strides: Tensor,
) -> None:
    """Write and clear each tensor's staged pieces; one launch for all is no faster on a CPU."""
    for tensor in tensors:
        tensor.apply_write()
