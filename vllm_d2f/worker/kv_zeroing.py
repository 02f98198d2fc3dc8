# SPDX-License-Identifier: Apache-2.0
"""Zeroes values that earlier requests left in the pages of a CPU cache, so that no NaN spreads.

vLLM's CPU attention multiplies whole pages. A position behind the end of a sequence has weight 0,
and 0 times the value that an earlier request left there is 0, unless that value is NaN or infinite.
So the values behind a request's end are set to zero when the request first reaches a page. GPU
kernels do not read behind the end.

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


class KVZeroing:
    """Knows which pages each slot has reached."""

    def __init__(self, vllm_config: "VllmConfig", num_slots: int) -> None:
        self.layers = vllm_config.compilation_config.static_forward_context
        self.reached_S = np.zeros(num_slots, dtype=np.int64)

    def start(self, slot: int) -> None:
        """Let another request take the slot, with other pages."""
        self.reached_S[slot] = 0

    def zero(
        self,
        slot_R: "NDArray",
        end_R: "NDArray",
        block_tables: Sequence["Tensor"],
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        """Zero new pages before a forward that writes these requests' positions up to `end_R`.

        Args:
            block_tables: per KV cache group the pages of each request, [R, pages].
        """
        # What a slot has reached is counted in positions: groups may have pages of several sizes.
        new_R = end_R > self.reached_S[slot_R]
        if not new_R.any():
            return
        for table, group in zip(block_tables, kv_cache_config.kv_cache_groups, strict=True):
            size = group.kv_cache_spec.block_size
            for at in np.flatnonzero(new_R):
                end = int(end_R[at])
                if -(-int(self.reached_S[slot_R[at]]) // size) == -(-end // size):
                    continue  # the request owns this page already
                page = int(table[at, (end - 1) // size])
                for name in group.layer_names:
                    _values(self.layers[name].kv_cache)[page, :, (end - 1) % size + 1 :] = 0
        self.reached_S[slot_R[new_R]] = end_R[new_R]


def _values(kv_cache: "Tensor") -> "Tensor":
    """View a layer's cached values as [pages, heads, positions, channels]; CPU_ATTN's layout."""
    pages, heads, size, _ = kv_cache.shape
    return kv_cache.view(pages, heads, 2 * size, -1)[:, :, size:]
