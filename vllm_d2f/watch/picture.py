# SPDX-License-Identifier: Apache-2.0
"""The state of a decoder after one forward, as a terminal, a GIF and a page can draw it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import zip_longest

from vllm_d2f.reference import Frame

MASK = "_"
"""The text of a masked position."""

PALETTE: tuple[tuple[str, str], ...] = (
    ("#0072b2", "#cfe5f2"),
    ("#d55e00", "#f8dfcc"),
    ("#007a5a", "#cceee3"),
    ("#a3407c", "#f3dbe9"),
    ("#8a6d00", "#f5ebc4"),
    ("#4b5a6b", "#dde2e8"),
)
"""Strong and light colours of the blocks, which colour-blind people can tell apart (Okabe, Ito)."""


def colours(block: int) -> tuple[str, str]:
    """Return the strong and the light colour of a block, by its index."""
    return PALETTE[block % len(PALETTE)]


class State(StrEnum):
    """The state of one position."""

    MASK = "mask"
    NEW = "new"  # decoded by this forward
    DECODED = "decoded"
    COMMITTED = "committed"


class Phase(StrEnum):
    """The phase of one block. An autoregressive answer is drawn as one committed block."""

    SEMI = "semi"
    FULL = "full"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Cell:
    """One position.

    Attributes:
        text: the token in printable form, or `MASK`.
        confidence: the token's probability when it was accepted; 0 for a masked position.
    """

    text: str
    state: State
    confidence: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive positions that are decoded together."""

    phase: Phase
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoder after one forward.

    Attributes:
        name: the model's name.
        forward: number of this forward; the first is 1.
        blocks: all blocks of the answer that are committed or open.
        text: the committed part of the answer.
        done: whether the answer is complete.
    """

    name: str
    forward: int
    blocks: tuple[Block, ...]
    text: str
    done: bool

    @property
    def tokens(self) -> int:
        """Decoded positions, including the end token."""
        return sum(cell.state != State.MASK for block in self.blocks for cell in block.cells)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forward

    @property
    def caption(self) -> str:
        """The figures of this forward on one line."""
        rate = f"{self.tokens_per_forward:.2f} per forward"
        return f"forward {self.forward}, {self.tokens} tokens, {rate}{', done' * self.done}"


def visible(text: str) -> str:
    """Escape the characters of a token that do not print, so that a terminal ignores them."""
    if not text:
        return "\\0"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pictures(
    name: str,
    frames: Iterable[Frame],
    show: Callable[[int], str],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Picture]:
    """Turn the frames of `vllm_d2f.reference.decode` into pictures.

    Args:
        show: returns the text of one token.
        decode: returns the text of several tokens.
    """
    before = 0  # positions that were committed when the forward began, before its open blocks
    for frame in frames:
        size, first = frame.block_size, before // frame.block_size
        new = set(frame.accepted)
        cells = []
        for position, token in enumerate(frame.tokens):
            if not frame.decided[position]:
                cells.append(Cell(MASK, State.MASK))
                continue
            state = State.COMMITTED if position < frame.committed else State.DECODED
            state = State.NEW if position in new else state
            cells.append(Cell(visible(show(token)), state, frame.confidences[position]))
        blocks = []
        for index, start in enumerate(range(0, len(cells), size)):
            if start < frame.committed:
                phase = Phase.COMMITTED
            else:
                phase = Phase.FULL if frame.activated[index - first] else Phase.SEMI
            blocks.append(Block(phase, tuple(cells[start : start + size])))
        before = frame.committed
        text = decode(frame.tokens[: frame.committed])
        yield Picture(name, frame.forward, tuple(blocks), text, frame.done)


def autoregressive(
    name: str,
    tokens: Iterable[tuple[int, float, bool]],
    show: Callable[[int], str],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Picture]:
    """Turn an answer that grows by one token per forward into pictures.

    Args:
        tokens: id and probability of each token, and whether it completes the answer.
    """
    ids: list[int] = []
    cells: tuple[Cell, ...] = ()
    for token, confidence, done in tokens:
        ids.append(token)
        older = (replace(cell, state=State.COMMITTED) for cell in cells)
        cells = (*older, Cell(visible(show(token)), State.NEW, confidence))
        yield Picture(name, len(ids), (Block(Phase.COMMITTED, cells),), decode(ids), done)


def together(*runs: Iterable[Picture]) -> Iterator[tuple[Picture, ...]]:
    """Yield one picture of each run per forward. A run that has ended repeats its last picture."""
    now: dict[int, Picture] = {}
    for tick in zip_longest(*runs):
        now |= {run: picture for run, picture in enumerate(tick) if picture is not None}
        yield tuple(now.values())
