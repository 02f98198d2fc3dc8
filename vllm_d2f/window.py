# SPDX-License-Identifier: Apache-2.0
"""The window: the open blocks of a batch of requests, as tensors.

`vllm_d2f.d2f` holds the algorithm; this file holds the state that it changes. Column 0 of a row is
the first position that is not committed. Blocks start at multiples of the block size from there.

Shape suffixes: R requests, W window positions, E end tokens; R1 is a column [R, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_d2f.strategies import ACCEPT, NUMBER, accept, entropy


@dataclass(frozen=True, slots=True)
class D2FParams:
    """How one request is decoded. Names follow the paper; defaults are its most used setting.

    Attributes:
        block_size: positions per block, at least 1.
        max_blocks: most blocks open at once, at least 1 (the paper has no such limit).
        tau_add: open the next block once this fraction of the last one is decoded, in [0, 1].
        tau_act: activate a block once this fraction of its predecessor is decoded.
        tau_conf: accept a proposal whose probability is greater than this, in [0, 1]; other rules
            say in their files what it is to them.
        min_per_step: fewest positions that a fully activated block takes in a forward, at least 1
            and as long as it has masked ones (1 in the paper). With tau_conf 1 it takes exactly as
            many: the static schedule of SDAR (arXiv 2510.06303).
        accept: the acceptance rule, a name in `vllm_d2f.strategies`.
        sub_block_size: decode the sub-blocks of a block one after the other, as Fast-dLLM v2
            (arXiv 2509.26328) does: its first position alone, then the others in sub-blocks of so
            many positions, counted from the block's begin. 0: all positions at once.
        cut_last_block: 1: the last block of an answer ends where max_tokens ends, as with
            Stable-DiffCoder (arXiv 2601.15892). 0: it is whole; what lies behind is dropped.
    """

    block_size: int = 32
    max_blocks: int = 4
    tau_add: float = 0.1
    tau_act: float = 0.95
    tau_conf: float = 0.9
    min_per_step: int = 1
    accept: str = "threshold"
    sub_block_size: int = 0
    cut_last_block: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "max_blocks", "min_per_step", "sub_block_size"):
            value, least = getattr(self, name), int(name != "sub_block_size")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.cut_last_block not in (0, 1):
            raise ValueError(f"cut_last_block must be 0 or 1, got {self.cut_last_block!r:.80}")
        if self.accept not in tuple(ACCEPT):
            raise ValueError(f"accept must be one of {', '.join(ACCEPT)}, got {self.accept!r:.80}")
        nats = self.accept == "entropy"
        for name in ("tau_add", "tau_act", "tau_conf"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            most, unit = (entropy.MOST, " nats") if nats and name == "tau_conf" else (1, "")
            if not number or not 0 <= value <= most:
                raise ValueError(f"{name} must be a number in [0, {most:g}]{unit}, got {value!r}")

    @property
    def window(self) -> int:
        """Widest window in positions."""
        return self.block_size * self.max_blocks

    def answer_end(self, goal: int) -> int:
        """Return where the last block ends of an answer that the request wants up to `goal`.

        Both are positions, counted from where a block begins.
        """
        return goal if self.cut_last_block else -(-goal // self.block_size) * self.block_size

    @property
    def tau(self) -> float:
        """`tau_conf` on the scale of the rule's confidences."""
        nats = self.accept == "entropy"
        return entropy.least_confidence(self.tau_conf) if nats else self.tau_conf


@dataclass(frozen=True, slots=True)
class Beginning:
    """A request that begins.

    Where blocks begin at multiples of the block size from position 0, the last tokens of the prompt
    may share a block with the answer. The window then begins with them, as positions that are
    decoded and emitted from the start.

    Attributes:
        params: how it is decoded.
        max_tokens: positions the request wants.
        limit: positions the model can still hold; a last block that does not fit is cut short.
        ends: end tokens, at most E of them.
        tail: tokens of the prompt that share a block with the answer, fewer than a block.
    """

    params: D2FParams
    max_tokens: int
    limit: int
    ends: Sequence[int]
    tail: Sequence[int] = ()

    def counters(self, width: int, room: int) -> list[int]:
        """Return the request's row of `Window.counters`.

        Args:
            width: W.
            room: E.

        Raises:
            ValueError: more end tokens than E.
        """
        if len(self.ends) > room:
            raise ValueError(f"{len(self.ends)} end tokens, there is room for {room}")
        params, size, tail = self.params, self.params.block_size, len(self.tail)
        goal, limit = tail + self.max_tokens, tail + self.limit
        rest = min(params.answer_end(goal), limit)
        values = [0, rest, min(goal, limit), -tail, 0, tail]
        values += [size, min(params.window, width)]
        values += [_fewest(params.tau_add, size), _fewest(params.tau_act, size)]
        values += [min(params.min_per_step, size), NUMBER[params.accept]]
        values += [min(params.sub_block_size, size)]
        return [*values, *self.ends, *[-1] * (room - len(self.ends))]


def _column(index: int) -> property:
    return property(lambda self: self.counters[:, index : index + 1])


def _vector(index: int) -> property:
    return property(lambda self: self.counters[:, index])


@dataclass(slots=True)
class Window:
    """One row per request; every setting may differ between rows.

    Whether a position is decoded is kept by position and never read from the token ids, so a mask
    token in a prompt is an ordinary token.

    The integers of a request lie side by side in `counters`, because on a small batch an operation
    costs its launch. Use the properties: `open_R1` is a column, `open_R` the same as a vector.

    Attributes:
        tokens_RW: int64, decoded tokens, the mask token elsewhere.
        decoded_RW: bool.
        counters: int64 [R, 13 + E]. Six change with every forward:
            open_R1: positions in open blocks;
            rest_R1: positions up to the last one that may be decoded;
            goal_R1: positions up to the last one that the request wants (max_tokens);
            start_R1: answer position of column 0, which is the number of committed tokens, and
                negative while the window begins with the end of the prompt;
            forward_R1: forwards so far;
            lead_R1: decoded positions before the first masked one, whose tokens are emitted.
            Seven and the end tokens are settings:
            block_R1: the block size;
            max_open_R1: positions of the widest window;
            add_R1, act_R1: tau_add and tau_act as decoded positions of a block;
            fewest_R1: positions that an active block takes at least;
            rule_R1: the acceptance rule's number;
            sub_R1: the sub-block size;
            ends_RE: end tokens, padded with -1.
        block_RW: int64, the column at which each column's block begins.
        previous_RW: int64, the column at which the block before it begins; 0 for the first.
        tau_R1: float32, the confidence threshold.
        column_W: int64, 0, 1, 2, ...
        num_ends: how many columns of ends_RE are in use.
        rules: names of the acceptance rules that rows may have.
        sub_blocks: whether any row has had sub-blocks.
    """

    tokens_RW: Tensor
    decoded_RW: Tensor
    counters: Tensor
    block_RW: Tensor
    previous_RW: Tensor
    tau_R1: Tensor
    column_W: Tensor
    num_ends: int = 0
    rules: frozenset[str] = frozenset()
    sub_blocks: bool = False

    open_R1, rest_R1, goal_R1, start_R1, forward_R1, lead_R1 = map(_column, range(6))
    block_R1, max_open_R1, add_R1, act_R1, fewest_R1, rule_R1, sub_R1 = map(_column, range(6, 13))
    open_R, rest_R, goal_R, start_R, forward_R, lead_R, block_R = map(_vector, range(7))

    @property
    def ends_RE(self) -> Tensor:
        return self.counters[:, _SETTINGS_END : _SETTINGS_END + self.num_ends]

    def accept(self, confidence_RW: Tensor, active_RW: Tensor) -> Tensor:
        """Decide by the rule of each row which proposals become tokens; see `threshold.accept`."""
        rows = (confidence_RW, self.block_RW, active_RW, self.tau_R1, self.fewest_R1)
        return accept(self.rules or ("threshold",), self.rule_R1, *rows)

    @property
    def masked_RW(self) -> Tensor:
        """Positions of open blocks that wait for a token."""
        return (self.column_W < self.open_R1) & ~self.decoded_RW

    @property
    def candidate_RW(self) -> Tensor:
        """Masked positions that may be decoded now: of each block the first sub-block with any."""
        masked_RW = self.masked_RW
        if not self.sub_blocks:
            return masked_RW
        offset_RW, sub_R1 = self.column_W - self.block_RW, self.sub_R1
        index_RW = 1 + offset_RW.div(sub_R1.clamp(min=1), rounding_mode="floor")
        index_RW = torch.where((offset_RW > 0) & (sub_R1 > 0), index_RW, 0)
        # Of decoded positions a number that no sub-block has.
        left_RW = torch.where(masked_RW, index_RW, len(self.column_W) + 1)
        first_RW = left_RW.scatter_reduce(1, self.block_RW, left_RW, "amin")
        return left_RW == first_RW.gather(1, self.block_RW).where(masked_RW, -1)

    @classmethod
    def empty(
        cls,
        num_rows: int,
        width: int,
        num_ends: int,
        mask_id: int,
        device: torch.device | str | None = None,
    ) -> "Window":
        """Make rows with nothing to decode; `start` fills them."""

        def full(value: float, dtype: torch.dtype, columns: int) -> Tensor:
            return torch.full((num_rows, columns), value, dtype=dtype, device=device)

        return cls(
            tokens_RW=full(mask_id, torch.int64, width),
            decoded_RW=full(False, torch.bool, width),
            counters=full(1, torch.int64, _SETTINGS_END + num_ends),
            block_RW=full(0, torch.int64, width),
            previous_RW=full(0, torch.int64, width),
            tau_R1=full(0.0, torch.float32, 1),
            column_W=torch.arange(width, device=device),
        )

    def start(self, rows: Sequence[int], beginnings: Sequence["Beginning"], mask_id: int) -> None:
        """Begin a request in each of these rows, whatever was there before.

        Raises:
            ValueError: more end tokens than E.
        """
        device, width = self.counters.device, len(self.column_W)
        room = self.counters.shape[1] - _SETTINGS_END
        index_R = to_device(torch.tensor(rows), device)
        counters = to_device(
            torch.tensor([one.counters(width, room) for one in beginnings]), device
        )
        tau_R1 = to_device(torch.tensor([[float(one.params.tau)] for one in beginnings]), device)
        self.counters.index_copy_(0, index_R, counters)
        self.tau_R1.index_copy_(0, index_R, tau_R1)
        self.tokens_RW.index_fill_(0, index_R, mask_id)
        self.decoded_RW.index_fill_(0, index_R, False)
        for row, one in zip(rows, beginnings, strict=True):
            if one.tail:
                tail = to_device(torch.tensor(one.tail), device)
                self.tokens_RW[row, : len(tail)].copy_(tail)
                self.decoded_RW[row, : len(tail)].fill_(True)
        size_R1 = counters[:, 6:7]
        block_RW = torch.div(self.column_W, size_R1, rounding_mode="floor") * size_R1
        self.block_RW.index_copy_(0, index_R, block_RW)
        self.previous_RW.index_copy_(0, index_R, (block_RW - size_R1).clamp(min=0))
        self.num_ends = max(self.num_ends, *(len(one.ends) for one in beginnings))
        self.rules |= {one.params.accept for one in beginnings}
        self.sub_blocks |= any(one.params.sub_block_size > 0 for one in beginnings)

    def rows(self, index_R: Tensor) -> "Window":
        """Return a copy of the given rows."""
        rows = {name: getattr(self, name).index_select(0, index_R) for name in _BY_ROW}
        return replace(self, **rows)

    def put(self, index_R: Tensor, rows: "Window") -> None:
        """Write back rows that the algorithm has changed. Settings stay."""
        self.tokens_RW.index_copy_(0, index_R, rows.tokens_RW)
        self.decoded_RW.index_copy_(0, index_R, rows.decoded_RW)
        state = self.counters[:, :_STATE_END]
        state.index_copy_(0, index_R, rows.counters[:, :_STATE_END])

    def set_state(self, *columns_R1: Tensor) -> None:
        """Write open, rest, goal, start, forward and lead, in this order."""
        self.counters[:, :_STATE_END] = torch.cat(columns_R1, dim=1)


_STATE_END, _SETTINGS_END = 6, 13
_BY_ROW = ("tokens_RW", "decoded_RW", "counters", "block_RW", "previous_RW", "tau_R1")


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a host tensor to a device without waiting for the copy.

    The driver waits if the source may be paged out, so a CUDA device gets it from pinned memory,
    which PyTorch keeps until the copy is done. (vLLM's `async_tensor_h2d` does the same; this
    package must not import vLLM.)
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _fewest(fraction: float, size: int) -> int:
    """Return the smallest count with count / size >= fraction."""
    count = math.ceil(fraction * size)
    # The product may be off by a rounding error; the quotient is what the rule compares.
    return count - 1 if count and (count - 1) / size >= fraction else count
