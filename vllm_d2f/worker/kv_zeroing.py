# SPDX-License-Identifier: Apache-2.0
"""A request whose values became NaN must not reach the next owner of its pages.

vLLM's CPU attention multiplies whole pages: a position behind a sequence's end has the weight 0,
and 0 times what an earlier request left there is 0, unless that is NaN or infinite. So the values
behind a request's end are set to zero when it first reaches a page. GPU kernels read zeros behind
the end by themselves.

Shape suffixes: S slots, R requests of the batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class StalePages:
    """Which pages each slot has reached."""

    def __init__(self, vllm_config: "VllmConfig", num_slots: int) -> None:
        self.layers = vllm_config.compilation_config.static_forward_context
        self.reached_S = np.zeros(num_slots, dtype=np.int64)

    def start(self, slot: int) -> None:
        """Another request takes the slot, with other pages."""
        self.reached_S[slot] = 0

    def clear(
        self,
        slot_R: "NDArray",
        end_R: "NDArray",
        block_tables: Sequence["Tensor"],
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        """Before a forward that writes the positions of these requests up to `end_R`.

        Args:
            block_tables: per KV cache group the pages of each request, [R, pages].
        """
        # What a slot reaches is counted in positions, as groups may have pages of different sizes.
        new_R = end_R > self.reached_S[slot_R]
        if not new_R.any():
            return
        for table, group in zip(block_tables, kv_cache_config.kv_cache_groups, strict=True):
            size = group.kv_cache_spec.block_size
            for at in np.flatnonzero(new_R):
                end = int(end_R[at])
                if -(-int(self.reached_S[slot_R[at]]) // size) == -(-end // size):
                    continue  # its own page already
                page = int(table[at, (end - 1) // size])
                for name in group.layer_names:
                    _values(self.layers[name].kv_cache)[page, :, (end - 1) % size + 1 :] = 0
        self.reached_S[slot_R[new_R]] = end_R[new_R]


def _values(kv_cache: "Tensor") -> "Tensor":
    """A layer's cached values, [pages, heads, positions, channels], as CPU_ATTN lays it out."""
    pages, heads, size, _ = kv_cache.shape
    return kv_cache.view(pages, heads, 2 * size, -1)[:, :, size:]
