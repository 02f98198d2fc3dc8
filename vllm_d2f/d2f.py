# SPDX-License-Identifier: Apache-2.0
"""Discrete Diffusion Forcing: the algorithm, and nothing else (arXiv 2508.09192).

A request's answer is decoded in blocks of `block_size` positions that start where the prompt ends.
Attention is bidirectional inside a block and causal between blocks, so a finished block's keys and
values are final and stay in the KV cache. The blocks that are not finished form the *window*:

      prompt      committed      |----------------- window -----------------|
    [ P P P P ] [ x x x x ] ... [ x x _ x ] [ x _ _ x ] [ _ _ _ _ ] [ . . . . ]
       cache        cache         fully       semi        semi       not open
                                activated   activated   activated
    x decided   _ mask   . no block there yet

One iteration: **add** a block if the last open one is filled enough, **activate** blocks whose
predecessor is filled enough, run the model's **forward** over the window, **accept** proposals
(above the confidence threshold; a fully activated block takes its best one if none is), **commit**
the leading blocks that went into the forward without a mask. `grow` adds, `activated` says which
blocks are activated, `advance` accepts and commits: the caller runs `grow`, forward, `advance`, and
again.

Everything here is vectorised over requests, runs on any device without a host sync and has no
loop. The engine, the reference loop, training and the viewer import it; it imports torch only.

Shape suffixes: R requests, W window positions, E end tokens; R1 is a column [R, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class D2FParams:
    """How one request is decoded. Names follow the paper; defaults are its most used setting.

    Attributes:
        block_size: positions per block, at least 1.
        max_blocks: most blocks open at once, at least 1 (the paper has no such limit).
        tau_add: open the next block once the last open one has this fraction decided, in [0, 1].
        tau_act: a block is fully activated once its predecessor has this fraction decided.
        tau_conf: accept a proposal whose probability is greater than this, in [0, 1].
    """

    block_size: int = 32
    max_blocks: int = 4
    tau_add: float = 0.1
    tau_act: float = 0.95
    tau_conf: float = 0.9

    def __post_init__(self) -> None:
        for name in ("block_size", "max_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("tau_add", "tau_act", "tau_conf"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")

    @property
    def window(self) -> int:
        """Widest window in positions."""
        return self.block_size * self.max_blocks


def _column(index: int) -> property:
    """One column of the per-request values, by name."""
    return property(lambda self: self.numbers[:, index])


@dataclass(slots=True)
class Window:
    """The undecided end of R requests: one row each, position 0 follows the last committed one.

    Rows of one window may differ in every setting. Whether a position is decided is kept by
    position, never by comparing token ids, so a mask token has no meaning of its own in a prompt.

    Few tensors, because on a small batch an operation costs its launch: what is kept per request
    lies side by side in one matrix, read through the properties below.

    Attributes:
        tokens_RW: int64, decided tokens, the mask token elsewhere.
        decided_RW: bool.
        numbers: int64 [R, 10 + E]. Changing with every forward:
            open_R, positions in open blocks;
            rest_R, positions from the window's start to the last one the request may decode;
            goal_R, positions from the window's start that the request still wants (max_tokens);
            start_R, answer position of the window's start, that is how many are committed;
            forward_R, forwards so far;
            lead_R, leading decided positions.
            Fixed: block_size_R; max_open_R, positions of the widest window; add_R and act_R,
            tau_add and tau_act as the fewest decided positions of a block that reach them;
            ends_RE, end tokens padded with -1.
        layout: int64 [R, 2W], the columns at which each column's block begins (start_RW) and at
            which the block before it does, 0 for the first block.
        tau_conf_R1: float32 [R, 1].
        column_W: int64, 0, 1, 2, ...
        num_ends: how many columns of ends_RE are in use.
    """

    tokens_RW: Tensor
    decided_RW: Tensor
    numbers: Tensor
    layout: Tensor
    tau_conf_R1: Tensor
    column_W: Tensor
    num_ends: int = 0

    open_R = _column(0)
    rest_R = _column(1)
    goal_R = _column(2)
    start_R = _column(3)
    forward_R = _column(4)
    lead_R = _column(5)
    block_size_R = _column(6)

    @classmethod
    def empty(
        cls,
        num_rows: int,
        width: int,
        num_ends: int,
        mask_id: int,
        device: torch.device | str | None = None,
    ) -> "Window":
        """Rows with nothing to decode; `start` fills them."""

        def full(value: float, dtype: torch.dtype, columns: int) -> Tensor:
            return torch.full((num_rows, columns), value, dtype=dtype, device=device)

        return cls(
            tokens_RW=full(mask_id, torch.int64, width),
            decided_RW=full(False, torch.bool, width),
            numbers=full(1, torch.int64, _STATE + _FIXED + num_ends),
            layout=full(0, torch.int64, 2 * width),
            tau_conf_R1=full(0.0, torch.float32, 1),
            column_W=torch.arange(width, device=device),
        )

    def start(
        self,
        row: int,
        params: D2FParams,
        *,
        max_tokens: int,
        limit: int,
        ends: Sequence[int],
        mask_id: int,
    ) -> None:
        """Begin a request in a row, whatever was there before.

        Args:
            max_tokens: positions the request wants.
            limit: positions the model can still hold; a last block that does not fit is cut short.
            ends: end tokens, at most E of them.
        """
        width, room = len(self.column_W), self.numbers.shape[1] - _STATE - _FIXED
        if len(ends) > room:
            raise ValueError(f"{len(ends)} end tokens, there is room for {room}")
        size = params.block_size
        whole_blocks = -(-max_tokens // size) * size
        self.tokens_RW[row] = mask_id
        self.decided_RW[row] = False
        state = [0, min(whole_blocks, limit), min(max_tokens, limit), 0, 0, 0]
        fixed = [size, min(params.window, width)]
        fixed += [_fewest(params.tau_add, size), _fewest(params.tau_act, size)]
        unused = [-1] * (room - len(ends))
        _copy_in(self.numbers[row], torch.tensor([*state, *fixed, *ends, *unused]))
        start_W = torch.div(self.column_W, size, rounding_mode="floor") * size
        self.layout[row] = torch.cat((start_W, (start_W - size).clamp(min=0)))
        self.tau_conf_R1[row] = params.tau_conf
        self.num_ends = max(self.num_ends, len(ends))

    def rows(self, index_R: Tensor) -> "Window":
        """A copy of the given rows."""
        return Window(
            self.tokens_RW.index_select(0, index_R),
            self.decided_RW.index_select(0, index_R),
            self.numbers.index_select(0, index_R),
            self.layout.index_select(0, index_R),
            self.tau_conf_R1.index_select(0, index_R),
            self.column_W,
            self.num_ends,
        )

    def put(self, index_R: Tensor, rows: "Window") -> None:
        """Write back rows that went through `grow` and `advance`; their settings stay."""
        self.tokens_RW.index_copy_(0, index_R, rows.tokens_RW)
        self.decided_RW.index_copy_(0, index_R, rows.decided_RW)
        self.numbers[:, :_STATE].index_copy_(0, index_R, rows.numbers[:, :_STATE])


# Columns of `Window.numbers` that change, and that do not (the end tokens come behind them).
_STATE, _FIXED = 6, 4


def _copy_in(row: Tensor, values: Tensor) -> None:
    """Write host values to a row; a device is not waited for."""
    if row.is_cuda:
        values = values.pin_memory()  # PyTorch reuses the memory only once the copy is done
    row.copy_(values, non_blocking=True)


def _fewest(fraction: float, size: int) -> int:
    """The smallest count with count / size >= fraction."""
    count = math.ceil(fraction * size)
    # The product may be off by a rounding error; the quotient is what the rule compares.
    return count - 1 if count and (count - 1) / size >= fraction else count


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward decided.

    Attributes:
        tokens_RW: int64, the window before it moved: column 0 is where the forward's began.
        commit_R: int64, leading positions whose keys and values are final now.
        sent_R: int64, leading positions that were output of earlier forwards already.
        output_R: int64, leading positions of `tokens_RW` that are output now: everything before
            the first undecided position, and never more than up to the answer's end.
        done_R: bool, nothing that could still be decided would change the output.
        accepted_RW: bool, positions decided by this forward.
        active_RW: bool, positions of fully activated blocks (`activated`).
        dropped_R: int64, blocks that were open and are not needed behind an end token.
    """

    tokens_RW: Tensor
    commit_R: Tensor
    sent_R: Tensor
    output_R: Tensor
    done_R: Tensor
    accepted_RW: Tensor
    active_RW: Tensor
    dropped_R: Tensor


def block_of(
    position: Tensor,
    prompt_len: Tensor | int,
    block_size: Tensor | int,
    prompt_block: int | None = None,
) -> Tensor:
    """Attention block of a position: 0 for the prompt, 1, 2, ... for the generated blocks.

    `prompt_block` is for models trained with a block-causal prompt: the prompt is cut into blocks
    of that many positions from its start, numbered so that the last, maybe shorter one is 0.
    """
    generated = 1 + torch.div(position - prompt_len, block_size, rounding_mode="floor")
    if prompt_block is None:
        prompt = torch.zeros_like(generated)
    else:
        prompt = torch.div(position, prompt_block, rounding_mode="floor") - (
            (prompt_len - 1) // prompt_block
        )
    return torch.where(position < prompt_len, prompt, generated)


def may_attend(
    q_position: Tensor,
    k_position: Tensor,
    prompt_len: Tensor | int,
    block_size: Tensor | int,
    prompt_block: int | None = None,
) -> Tensor:
    """The attention rule, bool: bidirectional inside a block, causal between blocks.

    Arguments broadcast: `may_attend(p[:, None], p[None, :], n, B)` is the dense mask.
    """
    return block_of(k_position, prompt_len, block_size, prompt_block) <= block_of(
        q_position, prompt_len, block_size, prompt_block
    )


def grow(window: Window) -> None:
    """Add (ALGORITHM: iteration step 1), in place, before a forward.

    An end token has cut `rest_R` down to the end of its block, so nothing is added behind it; and
    only the last block of all is ever shorter than the others, behind which nothing comes either.
    """
    open_R1, rest_R1 = window.numbers[:, :2].split(1, dim=1)
    block_R1, max_open_R1, add_R1, _ = _fixed(window)
    last_R1 = (open_R1 - 1).div(block_R1, rounding_mode="floor") * block_R1  # < 0 if none is open
    in_last_RW = window.decided_RW & (window.column_W >= last_R1)
    filled_R1 = (in_last_RW.sum(1, keepdim=True) >= add_R1) | (open_R1 == 0)
    limit_R1 = torch.minimum(rest_R1, max_open_R1)
    grown_R1 = torch.minimum(last_R1 + 2 * block_R1, limit_R1)
    open_R1.copy_(torch.where(filled_R1 & (open_R1 < limit_R1), grown_R1, open_R1))


def activated(window: Window) -> Tensor:
    """Activate (ALGORITHM: iteration step 2): whether each position's block is fully activated.

    Bool [R, W], the same all over a block. A function of what is decided and no state of its own:
    decided positions only ever become more, so an activated block stays activated. What precedes
    the window is decided, so its first block always is.
    """
    width = len(window.column_W)
    block_R1, _, _, act_R1 = _fixed(window)
    start_RW, previous_RW = window.layout[:, :width], window.layout[:, width:]
    decided_RW = torch.zeros_like(start_RW).scatter_add_(1, start_RW, window.decided_RW.long())
    return (decided_RW.gather(1, previous_RW) >= act_R1) | (window.column_W < block_R1)


def advance(window: Window, proposal_RW: Tensor, confidence_RW: Tensor, mask_id: int) -> Step:
    """Accept and commit (ALGORITHM: iteration steps 4 and 5), in place, after a forward.

    Args:
        window: what went into the forward, as `grow` left it, all open blocks.
        proposal_RW: int64, proposed tokens; read at undecided open positions only.
        confidence_RW: float32, their probabilities, never NaN (`proposal` sees to that). Where it
            is negative, the position is held: it is not decided in this forward.
        mask_id: the mask token, written where the window moves over.
    """
    column_W, width = window.column_W, len(window.column_W)
    decided_in_RW = window.decided_RW
    open_R1, rest_R1, goal_R1, start_R1, forward_R1, lead_in_R1 = window.numbers[:, :_STATE].split(
        1, dim=1
    )
    block_R1 = _fixed(window)[0]
    start_RW = window.layout[:, :width]
    masked_RW = (column_W < open_R1) & ~decided_in_RW

    # Accept. If any proposal of a block passes the threshold its best one does, so a fully
    # activated block may take its best one without asking. Of equals the first wins.
    candidate_RW = torch.where(masked_RW, confidence_RW, -1.0)
    best_RW = torch.full_like(candidate_RW, -1.0).scatter_reduce_(1, start_RW, candidate_RW, "amax")
    best_column_RW = torch.where(candidate_RW == best_RW.gather(1, start_RW), column_W, width)
    first_RW = torch.full_like(start_RW, width).scatter_reduce_(1, start_RW, best_column_RW, "amin")
    active_RW = activated(window)
    forced_RW = active_RW & (column_W == first_RW.gather(1, start_RW))
    # A decided position is no candidate, and a held one is none either: both are negative.
    accepted_RW = ((candidate_RW > window.tau_conf_R1) | forced_RW) & (candidate_RW >= 0)
    tokens_RW = torch.where(accepted_RW, proposal_RW, window.tokens_RW)
    decided_RW = decided_in_RW | accepted_RW
    lead_R1 = _lead(decided_RW)

    # End. Behind the block of the first decided end token nothing is decoded any more: the window
    # closes there at once, as later blocks cannot influence earlier ones.
    need_R1, was_open_R1 = goal_R1, open_R1
    if window.num_ends:
        ends_RE = window.numbers[:, _STATE + _FIXED :]
        is_end_RW = tokens_RW == ends_RE[:, :1]
        for end in range(1, window.num_ends):
            is_end_RW |= tokens_RW == ends_RE[:, end, None]
        is_end_RW &= decided_RW & (column_W < goal_R1)
        end_R1 = _lead(~is_end_RW)
        behind_R1 = (end_R1.div(block_R1, rounding_mode="floor") + 1) * block_R1
        # Without an end token `end_R1` is the window's width: too far to cut anything.
        ended_R1 = end_R1 < width
        rest_R1 = torch.where(ended_R1, torch.minimum(rest_R1, behind_R1), rest_R1)
        need_R1 = torch.where(ended_R1, end_R1 + 1, goal_R1)
        open_R1 = torch.minimum(open_R1, rest_R1)

    # Done when everything up to the end token, or up to the wanted length, is decided.
    done_R1 = lead_R1 >= need_R1

    # Commit the leading positions that went into the forward decided, in whole blocks; the last one
    # may be cut short. Their keys and values are final now.
    whole_R1 = lead_in_R1.div(block_R1, rounding_mode="floor") * block_R1
    commit_R1 = torch.where(lead_in_R1 >= rest_R1, rest_R1, whole_R1)
    # What is decided never changes, so it need not wait for its block.
    output_R1 = torch.minimum(lead_R1, need_R1)
    # Rounded down negatives: -(-n // block) blocks for n positions, the last maybe cut short.
    dropped_R1 = (-open_R1).div(block_R1, rounding_mode="floor")
    dropped_R1 -= (-was_open_R1).div(block_R1, rounding_mode="floor")
    step = Step(
        tokens_RW=tokens_RW,
        commit_R=commit_R1[:, 0],
        sent_R=lead_in_R1[:, 0].clone(),  # the window moves below
        output_R=output_R1[:, 0],
        done_R=done_R1[:, 0],
        accepted_RW=accepted_RW,
        active_RW=active_RW,
        dropped_R=dropped_R1[:, 0],
    )

    # Move the window over what was committed.
    source_RW = column_W + commit_R1
    inside_RW = source_RW < open_R1
    source_RW = source_RW.clamp_(max=width - 1)
    window.tokens_RW = torch.where(inside_RW, tokens_RW.gather(1, source_RW), mask_id)
    window.decided_RW = inside_RW & decided_RW.gather(1, source_RW)
    window.numbers[:, :_STATE] = torch.cat(
        (
            (open_R1 - commit_R1).clamp_(min=0),
            rest_R1 - commit_R1,
            goal_R1 - commit_R1,
            start_R1 + commit_R1,
            forward_R1 + 1,
            lead_R1 - commit_R1,
        ),
        dim=1,
    )
    return step


def close(window: Window, done_R: Tensor) -> None:
    """Open nothing any more in rows whose answer is complete, in place, after `advance`.

    For an engine that starts the next forward before it knows of the last one: what comes after a
    complete answer then proposes nothing, sends nothing and commits nothing.
    """
    state = window.numbers[:, :_STATE]
    keep_R1 = ~done_R[:, None]
    for column in (0, 1, 5):  # open_R, rest_R, lead_R
        state[:, column : column + 1] *= keep_R1
    window.decided_RW &= keep_R1


def _fixed(window: Window) -> tuple[Tensor, ...]:
    """block_size_R1, max_open_R1, add_R1, act_R1."""
    return window.numbers[:, _STATE : _STATE + _FIXED].split(1, dim=1)


def _lead(flag_RW: Tensor) -> Tensor:
    """How many leading columns of each row are True, int64 [R, 1]."""
    # cumprod is 1 up to the first False.
    return flag_RW.cumprod(1).sum(1, keepdim=True)
