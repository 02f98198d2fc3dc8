# SPDX-License-Identifier: Apache-2.0
"""What there is to see after one forward, however it is drawn."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_d2f.reference import Frame

__all__ = ["MASK", "Block", "Cell", "Phase", "Picture", "State", "autoregressive", "pictures"]
__all__ += ["together", "visible"]

MASK = "_"
"""Drawn where nothing is decided."""


class State(StrEnum):
    """Of one position."""

    MASK = "mask"
    NEW = "new"  # decided by this very forward
    DECIDED = "decided"
    COMMITTED = "committed"


class Phase(StrEnum):
    """Of one block. An autoregressive answer is one committed block."""

    SEMI = "semi"
    FULL = "full"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Cell:
    """One position.

    Attributes:
        text: printable; `MASK` where nothing is decided.
        confidence: the token's probability when it was accepted; 0 where there is none.
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
        name: of the model.
        forward: 1 for the first.
        blocks: from the answer's start on.
        text: the committed part of the answer, what a client has received by now.
        done: the answer is complete.
    """

    name: str
    forward: int
    blocks: tuple[Block, ...]
    text: str
    done: bool

    @property
    def tokens(self) -> int:
        """How many are decided, the end token included."""
        return sum(cell.state != State.MASK for block in self.blocks for cell in block.cells)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forward

    @property
    def caption(self) -> str:
        """One line of figures."""
        end = ", done" if self.done else ""
        return (
            f"forward {self.forward}, {self.tokens} tokens, "
            f"{self.tokens_per_forward:.2f} per forward{end}"
        )


def visible(text: str) -> str:
    """A token's text on one line, harmless to a terminal: what does not print is escaped."""
    if not text:
        return "\\0"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pictures(
    name: str,
    frames: Iterable[Frame],
    show: Callable[[int], str],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Picture]:
    """The frames of `vllm_d2f.reference.decode` as pictures.

    Args:
        show: the text of one token in its cell.
        decode: the text of a whole answer.
    """
    before = 0  # positions committed when the forward began: where its open blocks start
    for frame in frames:
        size, first = frame.block_size, before // frame.block_size
        new = set(frame.accepted)
        cells = []
        for position, token in enumerate(frame.tokens):
            if not frame.decided[position]:
                cells.append(Cell(MASK, State.MASK))
                continue
            state = State.COMMITTED if position < frame.committed else State.DECIDED
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
    """An answer that grows by one token per forward as pictures.

    Args:
        tokens: id, probability, and whether the answer is complete with it.
    """
    ids: list[int] = []
    cells: list[Cell] = []
    for token, confidence, done in tokens:
        ids.append(token)
        older = [Cell(cell.text, State.COMMITTED, cell.confidence) for cell in cells]
        cells = [*older, Cell(visible(show(token)), State.NEW, confidence)]
        yield Picture(name, len(ids), (Block(Phase.COMMITTED, tuple(cells)),), decode(ids), done)


def together(*runs: Iterable[Picture]) -> Iterator[tuple[Picture, ...]]:
    """One picture of each run per forward; a run that has ended stays at its last picture."""
    iterators = [iter(run) for run in runs]
    now: list[Picture | None] = [None] * len(iterators)
    while True:
        moved = False
        for index, iterator in enumerate(iterators):
            if (picture := next(iterator, None)) is not None:
                now[index], moved = picture, True
        if not moved:
            return
        yield tuple(picture for picture in now if picture is not None)
