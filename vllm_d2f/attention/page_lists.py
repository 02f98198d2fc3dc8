# SPDX-License-Identifier: Apache-2.0
"""Block sequences in FlashInfer's form: flat page lists with offsets.

Lengths are known on the host and page numbers on the device only, so nothing here waits for the
device. The number of sequences in a step is bounded by its tokens (each sequence has at least one
query), and not by `max_num_seqs`, for which vLLM's own builders size their buffers.

Shape suffixes: S sequences, P pages of the longest one, N pages of all.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d, np_to_pinned_tensor


class PagedSequences(NamedTuple):
    """Arguments of FlashInfer's `plan`: int32, on the host except for the pages.

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
    """Builds `PagedSequences`. The page list of an ordinary step stays at one address."""

    def __init__(self, page_size: int, capacity: int, device: torch.device | str) -> None:
        """
        Args:
            page_size: positions of a page.
            capacity: pages that fit into the buffer. A step with more (a long answer that is
                computed again after a preemption) takes memory of its own.
        """
        self.page_size = page_size
        self.device = torch.device(device)
        self.buffer_N = torch.zeros(capacity, dtype=torch.int32, device=self.device)

    def build(
        self,
        query_start_S1: NDArray[np.int32],
        kv_len_S: NDArray[np.int32],
        table_SP: Tensor,
    ) -> PagedSequences:
        """Make the page lists of a step.

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
        start_S = async_tensor_h2d(page_start_S1[:-1], device=self.device)
        # With its size known on the host, repeat_interleave does not wait for the device.
        sequence_N = torch.arange(len(count_S), device=self.device).repeat_interleave(
            async_tensor_h2d(count_S.astype(np.int32), device=self.device), output_size=total
        )
        column_N = torch.arange(total, device=self.device) - start_S[sequence_N]
        fits = total <= len(self.buffer_N)
        pages_N = self.buffer_N[:total] if fits else self.buffer_N.new_empty(total)
        pages_N.copy_(table_SP[sequence_N, column_N])
        last_page_len_S = kv_len_S - (count_S - 1).clip(min=0) * self.page_size
        return PagedSequences(
            # New memory in each step: a copy to the device may be in flight during the next one.
            np_to_pinned_tensor(query_start_S1.astype(np.int32)),
            np_to_pinned_tensor(page_start_S1),
            pages_N,
            np_to_pinned_tensor(last_page_len_S.astype(np.int32)),
            np_to_pinned_tensor(kv_len_S.astype(np.int32)),
        )
