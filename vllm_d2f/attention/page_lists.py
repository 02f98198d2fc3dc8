# SPDX-License-Identifier: Apache-2.0
"""Virtual sequences in FlashInfer's form: flat page lists with offsets.

Lengths are known on the host, page numbers on the device only, so nothing here waits for it. How
many sequences a step has is bounded by its tokens (each has at least one query) and not by
`max_num_seqs`, for which vLLM's own builders size their buffers.

Shape suffixes: S sequences, P pages of the longest one, N pages of all.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_d2f.sampling.host_copy import to_device


class PagedSequences(NamedTuple):
    """What FlashInfer's `plan` wants. int32; on the host, except the pages.

    Attributes:
        query_start_S1: [S + 1], queries of sequence s are [query_start[s], query_start[s + 1]).
        page_start_S1: [S + 1], likewise its pages in `pages_N`.
        pages_N: on the device.
        last_page_len_S: positions in use on the last page, 1 to the page size; 0 without pages.
        kv_len_S: number of keys.
    """

    query_start_S1: Tensor
    page_start_S1: Tensor
    pages_N: Tensor
    last_page_len_S: Tensor
    kv_len_S: Tensor


class PageLists:
    """Builds `PagedSequences`; the page list of an ordinary step stays at one address.

    Args:
        page_size: positions of a page.
        capacity: pages that fit into the buffer. A step with more, a long answer computed again
            after a preemption, takes memory of its own.
    """

    def __init__(self, page_size: int, capacity: int, device: torch.device | str) -> None:
        self.page_size = page_size
        self.device = torch.device(device)
        self.buffer_N = torch.zeros(capacity, dtype=torch.int32, device=self.device)

    def build(
        self,
        query_start_S1: NDArray[np.int32],
        kv_len_S: NDArray[np.int32],
        table_SP: Tensor,
    ) -> PagedSequences:
        """Page lists of a step.

        Args:
            query_start_S1, kv_len_S: as in `BlockSequences`. A length of 0 is a sequence that
                fills up a CUDA graph: without queries, keys and pages.
            table_SP: int32 on the device, each sequence's page table; entries beyond its last page
                are not read.

        Raises:
            ValueError: when a sequence is longer than its page table.
        """
        count_S = -(-kv_len_S // self.page_size)
        if (longest := int(count_S.max(initial=0))) > table_SP.shape[1]:
            raise ValueError(
                f"a sequence of {longest} pages in a table of {table_SP.shape[1]}; "
                "is the block table that of the attention group?"
            )
        page_start_S1 = np.zeros(len(count_S) + 1, dtype=np.int32)
        count_S.cumsum(out=page_start_S1[1:])
        total = int(page_start_S1[-1])
        start_S = self._put(page_start_S1[:-1])
        # With its size known on the host, repeat_interleave does not wait for the device.
        sequence_N = torch.arange(len(count_S), device=self.device).repeat_interleave(
            self._put(count_S), output_size=total
        )
        column_N = torch.arange(total, device=self.device) - start_S[sequence_N]
        fits = total <= len(self.buffer_N)
        pages_N = self.buffer_N[:total] if fits else self.buffer_N.new_empty(total)
        pages_N.copy_(table_SP[sequence_N, column_N])
        return PagedSequences(
            self._pin(query_start_S1),
            self._pin(page_start_S1),
            pages_N,
            self._pin(kv_len_S - (count_S - 1).clip(min=0) * self.page_size),
            self._pin(kv_len_S),
        )

    def _pin(self, values: NDArray[np.integer]) -> Tensor:
        """New memory each step: the copy to the device may still be under way in the next."""
        out = torch.from_numpy(values.astype(np.int32))
        return out.pin_memory() if self.device.type == "cuda" else out

    def _put(self, values: NDArray[np.integer]) -> Tensor:
        return to_device(torch.from_numpy(values.astype(np.int32)), self.device)
