# SPDX-License-Identifier: Apache-2.0
"""The adaptive window: how many blocks of each window a step computes.

One request alone is decoded fastest with a wide window, because a step costs nearly the same
whatever its width. On a busy machine every position costs, and a position far behind the first mask
is decided seldom. So before each step the scheduler chooses, for all requests together, how many
leading blocks of each window go into the forward: those with which

    expected positions decided in the step / expected duration of the step

is greatest. Attention is causal between blocks, so what is left out changes nothing before it, and
every choice is a valid D2F decode: a block that sits out a step waits as it is.

Two tables stand behind the choice. `StepCost` holds what a step costs by its positions; it is
measured when the engine starts (`worker.step_cost`) and corrected with every served step.
`DecisionRates` holds how often a masked position is decided, by its block's place in the window and
by how far the block before it is decided; it is learned while serving.

Shape suffixes: R requests, J blocks of a window, W positions of a window, S measured sizes, M
prices, F levels of how far a block is decided.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

BLOCKS = 8
"""Places in the window that the rates tell apart; blocks behind share the last one's."""

LEVELS = 5
"""Levels of a block: below a quarter, a half, three quarters, all of it decided; all of it."""

MEMORY = 0.995
"""What one step leaves of earlier counts: the rates follow the text within a few hundred steps."""

PRIOR = 4.0, 0.5
"""Masked positions, and the share of them that is decided, with which every rate begins. It is
high, so that a place that was never computed is tried."""

NEAR, FAR = 0.2, 0.05
"""How far a served step moves the cost of its own size, and of sizes that none was near, in
logarithms."""

UNSEEN = 1e-3
"""Weight of a size that no served step was near, where one that was has up to 1."""

SIZES = tuple(round(2 ** (half / 2)) for half in range(29))
"""Positions for which a cost is kept, beside those that were measured: up to 16,384."""

OUTLIER = 1.5
"""A step longer than e^1.5 of what is expected (a pause of the machine) counts as one of that."""

MOST_PRICES = 16

UNKNOWN = {1: 5e-3, SIZES[-1]: 5e-3}
"""Costs where none were measured: all alike, so windows are wide until served steps say more."""


class StepCost:
    """Seconds of a step by its positions; they never fall with more positions."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        """
        Args:
            measured: positions -> seconds; empty: not known yet.
        """
        known = sorted((measured or UNKNOWN).items())
        most = max(known[-1][0], SIZES[-1])
        size_S = np.unique([*(size for size in SIZES if size <= most), *dict(known)])
        self.size_S = size_S.astype(float)
        at, seconds = (np.array(values, dtype=float) for values in zip(*known, strict=True))
        # Beyond what was measured, in proportion; before it, alike.
        beyond_S = np.maximum(self.size_S / at[-1], 1)
        self.log_S = np.log(np.maximum(np.interp(self.size_S, at, seconds) * beyond_S, 1e-9))
        self.seen_S = np.full(len(self.size_S), UNSEEN)
        self.seconds_S = np.exp(_never_falling(self.log_S, self.seen_S))

    def seconds(self, positions: Floats) -> Floats:
        """Interpolate between the measured costs."""
        beyond = np.maximum(positions / self.size_S[-1], 1)
        return beyond * np.interp(positions, self.size_S, self.seconds_S)

    def correct(self, positions: int, seconds: float) -> None:
        """Learn from a served step."""
        at, log2_S = np.log2(max(positions, 1)), np.log2(self.size_S)
        expected = float(np.interp(at, log2_S, self.log_S))
        error = float(np.clip(np.log(max(seconds, 1e-9)) - expected, -OUTLIER, OUTLIER))
        # The two sizes beside it, by their share; sizes that no step was near follow.
        spacing = log2_S[-1] - log2_S[-2]
        share_S = (1 - np.abs(log2_S - at) / spacing).clip(min=0)
        self.log_S += error * np.maximum(NEAR * share_S, FAR * (1 - self.seen_S))
        self.seen_S += NEAR * (share_S - self.seen_S).clip(min=0)
        self.seconds_S = np.exp(_never_falling(self.log_S, self.seen_S))


def _never_falling(value_S: Floats, weight_S: Floats) -> Floats:
    """Return the values that never fall and are nearest to these (isotonic regression).

    What falls with more positions is noise, or was measured while the machine was busy: it gets the
    mean of its neighbours, in which sizes that were served count most.
    """
    means: list[list[float]] = []  # value, weight, how many sizes
    for value, weight in zip(value_S.tolist(), weight_S.tolist(), strict=True):
        means.append([value, weight, 1])
        while len(means) > 1 and means[-2][0] > means[-1][0]:
            value, weight, count = means.pop()
            last = means[-1]
            last[0] = (last[0] * last[1] + value * weight) / (last[1] + weight)
            last[1], last[2] = last[1] + weight, last[2] + count
    return np.repeat([mean[0] for mean in means], [int(mean[2]) for mean in means])


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a batch, by block.

    Attributes:
        start_R: answer position at which the window begins.
        block_R: the block size.
        size_RJ: positions of each open block, 0 where none is open.
        masked_RJ: masked positions among them.
    """

    start_R: Integers
    block_R: Integers
    size_RJ: Integers
    masked_RJ: Integers

    @classmethod
    def of(
        cls,
        windows: Sequence[Sequence[int]],
        start: Sequence[int],
        block: Sequence[int],
        tail: Sequence[int],
        mask_id: int,
    ) -> "Windows":
        """Count the positions of each block.

        Args:
            windows: tokens of each window without the prompt's tail.
            start, block, tail: where each begins, its block size, and its tokens of the prompt.
        """
        length_R = np.array([len(window) for window in windows])
        block_R, tail_R = np.array(block), np.array(tail)
        flat = np.fromiter(itertools.chain.from_iterable(windows), np.int64, length_R.sum())
        row = np.arange(len(length_R)).repeat(length_R)
        column = np.arange(len(flat)) - (length_R.cumsum() - length_R)[row] + tail_R[row]
        blocks = int((-(-(length_R + tail_R) // block_R)).max())
        place = row * blocks + column // block_R[row]
        shape = (len(length_R), blocks)
        count = len(length_R) * blocks
        size_RJ = np.bincount(place, minlength=count).reshape(shape)
        masked_RJ = np.bincount(place[flat == mask_id], minlength=count).reshape(shape)
        size_RJ[:, 0] += tail_R
        return cls(np.array(start), block_R, size_RJ, masked_RJ)

    def place_RJ(self) -> Integers:
        """Return the entry of `DecisionRates` for each block."""
        decided_RJ = (self.size_RJ - self.masked_RJ) / self.block_R[:, None]
        before_RJ = np.ones_like(decided_RJ)
        before_RJ[:, 1:] = decided_RJ[:, :-1]
        level_RJ = np.minimum((before_RJ * (LEVELS - 1)).astype(int), LEVELS - 1)
        return np.minimum(np.arange(self.size_RJ.shape[1]), BLOCKS - 1) * LEVELS + level_RJ

    def least_R(self) -> Integers:
        """Count the blocks that must go into the forward, up to that of the first masked position:
        decoded blocks before it are then committed."""
        return (self.masked_RJ.cumsum(1) == 0).sum(1) + 1


class DecisionRates:
    """How often a masked position is decided in a step, [BLOCKS * LEVELS]."""

    def __init__(self) -> None:
        masked, rate = PRIOR
        self.masked = np.full(BLOCKS * LEVELS, masked)
        self.decided = np.full(BLOCKS * LEVELS, masked * rate)

    def expected_RJ(self, windows: Windows) -> Floats:
        """Return how many positions a step is expected to decode in each block."""
        return windows.masked_RJ * (self.decided / self.masked)[windows.place_RJ()]

    def learn(self, place_N: Integers, masked_N: Integers, decided_N: Integers) -> None:
        """Count the blocks that a step computed."""
        for counts, value_N in ((self.masked, masked_N), (self.decided, decided_N)):
            counts *= MEMORY
            counts += np.bincount(place_N, value_N, minlength=len(counts))


def choose(
    gain_RJ: Floats, size_RJ: Integers, least_R: Integers, cost: StepCost, others: int
) -> Integers:
    """Choose the leading blocks of each window, [R].

    For a price per position every request takes the blocks with the greatest gain less price. The
    price with the best ratio of gain to duration wins.

    Args:
        gain_RJ: expected decided positions of each block.
        size_RJ: positions of each block, 0 where none is open.
        least_R: fewest blocks.
        others: positions in the step beside these windows.
    """
    open_RJ = size_RJ > 0
    density = np.unique((gain_RJ / np.maximum(size_RJ, 1))[open_RJ])
    price_M = np.concatenate(([0.0], np.quantile(density, np.linspace(0, 1, MOST_PRICES))))
    gain_RJ, size_RJ = gain_RJ.cumsum(1), size_RJ.cumsum(1)
    may_RJ = open_RJ & (np.arange(size_RJ.shape[1]) >= least_R[:, None] - 1)
    may_RJ[np.arange(len(least_R)), np.minimum(least_R, open_RJ.sum(1)) - 1] = True
    value_MRJ = gain_RJ - price_M[:, None, None] * size_RJ
    best_MR = np.where(may_RJ, value_MRJ, -np.inf).argmax(2)
    row_R = np.arange(len(least_R))
    gain_M, size_M = gain_RJ[row_R, best_MR].sum(1), size_RJ[row_R, best_MR].sum(1)
    best = (gain_M / cost.seconds(size_M + float(others))).argmax()
    blocks_R: Integers = best_MR[best] + 1
    return blocks_R


class AdaptiveWindow:
    """Chooses windows, and learns from what came of the choice."""

    def __init__(self, measured: Mapping[int, float], mask_id: int) -> None:
        self.cost, self.rates, self.mask_id = StepCost(measured), DecisionRates(), mask_id
        self.chosen: dict[str, int] = {}  # request -> its row in the last choice
        self.windows: Windows | None = None
        self.blocks_R: Integers | None = None

    def choose(
        self,
        req_ids: Sequence[str],
        tokens: Sequence[Sequence[int]],
        start: Sequence[int],
        block: Sequence[int],
        tail: Sequence[int],
        others: int,
    ) -> list[int]:
        """Choose for each request how many tokens of its window go into the next forward.

        Args:
            tokens, start, block, tail: see `Windows.of`.
            others: positions in the step beside these windows.
        """
        windows = self.windows = Windows.of(tokens, start, block, tail, self.mask_id)
        gain_RJ = self.rates.expected_RJ(windows)
        blocks_R = choose(gain_RJ, windows.size_RJ, windows.least_R(), self.cost, others)
        self.blocks_R, self.chosen = blocks_R, {req_id: r for r, req_id in enumerate(req_ids)}
        inside_RJ = np.arange(windows.size_RJ.shape[1]) < blocks_R[:, None]
        width_R = (windows.size_RJ * inside_RJ).sum(1) - np.array(tail)
        return [int(width) for width in width_R]

    def learn(
        self,
        req_ids: Sequence[str],
        tokens: Sequence[Sequence[int]],
        start: Sequence[int],
        tail: Sequence[int],
    ) -> None:
        """Compare the windows after the step with those that were chosen for it."""
        known = [i for i, req_id in enumerate(req_ids) if req_id in self.chosen and tokens[i]]
        before, blocks_R = self.windows, self.blocks_R
        if not known or before is None or blocks_R is None:
            return
        row_R = np.array([self.chosen[req_ids[i]] for i in known])
        block_R = before.block_R[row_R]
        after = Windows.of(
            [tokens[i] for i in known],
            [start[i] for i in known],
            list(block_R),
            [tail[i] for i in known],
            self.mask_id,
        )
        # Where each block is now: in front of the window (committed), in it, or gone.
        moved_R = (after.start_R - before.start_R[row_R]) // block_R
        now_RJ = np.arange(before.size_RJ.shape[1]) - moved_R[:, None]
        last = after.size_RJ.shape[1] - 1
        size_RJ, left_RJ = (
            np.where((now_RJ < 0) | (now_RJ > last), 0, values_RJ[row, now_RJ.clip(0, last)])
            for row in (np.arange(len(known))[:, None],)
            for values_RJ in (after.size_RJ, after.masked_RJ)
        )
        masked_RJ = before.masked_RJ[row_R]
        computed_RJ = np.arange(masked_RJ.shape[1]) < blocks_R[row_R, None]
        # Blocks behind an end token are gone, and count for nothing.
        counted_RJ = computed_RJ & (masked_RJ > 0) & ((now_RJ < 0) | (size_RJ > 0))
        self.rates.learn(
            before.place_RJ()[row_R][counted_RJ],
            masked_RJ[counted_RJ],
            (masked_RJ - left_RJ)[counted_RJ],
        )
