# SPDX-License-Identifier: Apache-2.0
"""How many undecided positions each request has at most, without waiting for the device.

The language-model head runs over undecided positions only, and how many there are is known on the
device. Their number after each forward is copied to the host behind it, and read when that copy is
certainly done: the engine has read that forward's tokens by then. For forwards whose copy is still
under way the bound grows by what a forward can add, which is one block.

Nothing here depends on timing, so the ranks of a tensor-parallel group agree on every bound.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class _Noted(NamedTuple):
    done: Any
    slots: NDArray[np.int64]
    occupant: NDArray[np.int64]
    forward: NDArray[np.int64]
    undecided: Tensor


class UndecidedBounds:
    """Bounds by slot.

    Args:
        num_slots: rows of the runner's state.
        under_way: forwards whose results the engine may not have read when the next one is
            prepared: 0 with synchronous scheduling, 1 with asynchronous.
        event: makes an event that `record()`s the copy and is `synchronize()`d with.
    """

    def __init__(self, num_slots: int, under_way: int, event: Callable[[], Any]) -> None:
        self.under_way, self.event = under_way, event
        self._known_S = np.zeros(num_slots, dtype=np.int64)
        self._block_S = np.ones(num_slots, dtype=np.int64)
        # Forwards of a slot's occupant so far, and at which of them `_known_S` was.
        self._forward_S = np.zeros(num_slots, dtype=np.int64)
        self._known_at_S = np.zeros(num_slots, dtype=np.int64)
        self._occupant_S = np.zeros(num_slots, dtype=np.int64)
        self._noted: deque[_Noted] = deque()

    def start(self, slot: int, known: int, block_size: int) -> None:
        """A request takes a slot, with at most `known` undecided positions."""
        self._known_S[slot], self._block_S[slot] = known, block_size
        self._forward_S[slot] = self._known_at_S[slot] = 0
        self._occupant_S[slot] += 1

    def bound(self, slots: Sequence[int], width_D: NDArray[np.integer]) -> NDArray[np.int64]:
        """At most so many undecided positions go into the next forward, [D].

        Args:
            width_D: positions of its window that each request has in it, at most.
        """
        while len(self._noted) > self.under_way:
            self._settle(self._noted.popleft())
        at = np.asarray(slots, dtype=np.int64)
        behind_D = self._forward_S[at] - self._known_at_S[at]
        return np.minimum(self._known_S[at] + behind_D * self._block_S[at], width_D)

    def note(self, slots: Sequence[int], undecided_D: Tensor) -> None:
        """A forward is under way that leaves so many undecided, [D], the newly opened included."""
        at = np.array(slots, dtype=np.int64)
        self._forward_S[at] += 1
        count = torch.empty(
            undecided_D.shape, dtype=undecided_D.dtype, pin_memory=undecided_D.is_cuda
        )
        count.copy_(undecided_D, non_blocking=True)
        done = self.event()
        done.record()
        noted = _Noted(done, at, self._occupant_S[at], self._forward_S[at], count)
        self._noted.append(noted)

    def _settle(self, noted: _Noted) -> None:
        noted.done.synchronize()
        same = self._occupant_S[noted.slots] == noted.occupant
        at = noted.slots[same]
        self._known_S[at] = noted.undecided.numpy()[same]
        self._known_at_S[at] = noted.forward[same]
