# SPDX-License-Identifier: Apache-2.0
"""Upper bounds of the number of masked positions per request, known without waiting for the device.

The language-model head runs over masked positions only, and only the device knows how many there
are. Their number after each forward is copied to the host behind that forward. It is read when the
copy is certainly done, because the engine has read the forward's tokens by then. For each forward
whose copy may still be in flight the bound grows by what a forward can add, which is one block.

A bound does not depend on timing, so all ranks of a tensor-parallel group agree on it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class _Record(NamedTuple):
    """The counts that one forward leaves."""

    copied: Any
    slots: NDArray[np.int64]
    occupant: NDArray[np.int64]
    forward: NDArray[np.int64]
    masked: Tensor


class MaskedBounds:
    """Bounds by slot."""

    def __init__(self, num_slots: int, in_flight: int, event: Callable[[], Any]) -> None:
        """
        Args:
            num_slots: rows of the runner's state.
            in_flight: forwards whose results the engine may not have read when it prepares the next
                one: 0 with synchronous scheduling, 1 with asynchronous scheduling.
            event: makes an event that `record()`s the copy and is `synchronize()`d with.
        """
        self.in_flight, self.event = in_flight, event
        self._known_S = np.zeros(num_slots, dtype=np.int64)
        self._block_S = np.ones(num_slots, dtype=np.int64)
        # Forwards of the request in the slot so far, and the forward that `_known_S` is from.
        self._forward_S = np.zeros(num_slots, dtype=np.int64)
        self._known_at_S = np.zeros(num_slots, dtype=np.int64)
        self._occupant_S = np.zeros(num_slots, dtype=np.int64)
        self._records: deque[_Record] = deque()

    def start(self, slot: int, known: int, block_size: int) -> None:
        """Let a request take a slot, with at most `known` masked positions."""
        self._known_S[slot], self._block_S[slot] = known, block_size
        self._forward_S[slot] = self._known_at_S[slot] = 0
        self._occupant_S[slot] += 1

    def bound(self, slots: Sequence[int], width_D: NDArray[np.integer]) -> NDArray[np.int64]:
        """Bound the masked positions that go into the next forward, [D].

        Args:
            width_D: positions of its window that each request has in it, at most.
        """
        while len(self._records) > self.in_flight:
            self._read(self._records.popleft())
        at = np.asarray(slots, dtype=np.int64)
        behind_D = self._forward_S[at] - self._known_at_S[at]
        return np.minimum(self._known_S[at] + behind_D * self._block_S[at], width_D)

    def record(self, slots: Sequence[int], masked_D: Tensor) -> None:
        """Take the masked positions that a forward leaves, [D], newly opened blocks included."""
        at = np.array(slots, dtype=np.int64)
        self._forward_S[at] += 1
        count = torch.empty(masked_D.shape, dtype=masked_D.dtype, pin_memory=masked_D.is_cuda)
        count.copy_(masked_D, non_blocking=True)
        copied = self.event()
        copied.record()
        self._records.append(_Record(copied, at, self._occupant_S[at], self._forward_S[at], count))

    def _read(self, record: _Record) -> None:
        record.copied.synchronize()
        same = self._occupant_S[record.slots] == record.occupant
        at = record.slots[same]
        self._known_S[at] = record.masked.numpy()[same]
        self._known_at_S[at] = record.forward[same]
