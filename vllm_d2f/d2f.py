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
the leading blocks that went into the forward without a mask. `grow` is add and activate, `advance`
is accept and commit: the caller runs `grow`, forward, `advance`, and again.

Everything here is vectorised over requests, runs on any device without a host sync and has no
loop. The engine, the reference loop, training and the viewer import it; it imports torch only.

Shape suffixes: R requests, W window positions, B positions of a block, E end tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

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


@dataclass(slots=True)
class Window:
    """The undecided end of R requests: one row each, position 0 follows the last committed one.

    Rows of one window may differ in every setting. Whether a position is decided is kept by position, never by comparing token ids, so a mask token
    has no meaning of its own in a prompt.

    Attributes:
        tokens_RW: int64, decided tokens, the mask token elsewhere.
        decided_RW: bool.
        full_RW: bool, the position's block is fully activated (same value all over a block).
        confidence_RW: float32, probability of the token when it was accepted, 0 where undecided.
        open_R: int64, positions in open blocks.
        rest_R: int64, positions from the window's start to the last one this request may decode.
        goal_R: int64, positions from the window's start that the request still wants (max_tokens).
        ended_R: bool, an end token has been decided.
        start_R: int64, answer position of the window's start: what is committed.
        forward_R: int64, forwards so far.
        block_size_R, max_open_R: int64, positions per block and in the widest window.
        tau_add_R, tau_act_R: float64; tau_conf_R: float32.
        ends_RE: int64, end tokens, padded with -1.
    """

    tokens_RW: Tensor
    decided_RW: Tensor
    full_RW: Tensor
    confidence_RW: Tensor
    open_R: Tensor
    rest_R: Tensor
    goal_R: Tensor
    ended_R: Tensor
    start_R: Tensor
    forward_R: Tensor
    block_size_R: Tensor
    max_open_R: Tensor
    tau_add_R: Tensor
    tau_act_R: Tensor
    tau_conf_R: Tensor
    ends_RE: Tensor

    @classmethod
    def empty(cls, num_rows: int, width: int, num_ends: int, mask_id: int, device=None) -> "Window":
        """Rows with nothing to decode; `start` fills them."""

        def full(value, dtype, *shape):
            return torch.full((num_rows, *shape), value, dtype=dtype, device=device)

        return cls(
            tokens_RW=full(mask_id, torch.int64, width),
            decided_RW=full(False, torch.bool, width),
            full_RW=full(False, torch.bool, width),
            confidence_RW=full(0.0, torch.float32, width),
            open_R=full(0, torch.int64),
            rest_R=full(0, torch.int64),
            goal_R=full(0, torch.int64),
            ended_R=full(False, torch.bool),
            start_R=full(0, torch.int64),
            forward_R=full(0, torch.int64),
            block_size_R=full(1, torch.int64),
            max_open_R=full(0, torch.int64),
            tau_add_R=full(0.0, torch.float64),
            tau_act_R=full(0.0, torch.float64),
            tau_conf_R=full(0.0, torch.float32),
            ends_RE=full(-1, torch.int64, num_ends),
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
        whole_blocks = -(-max_tokens // params.block_size) * params.block_size
        self.tokens_RW[row] = mask_id
        self.decided_RW[row] = False
        self.full_RW[row] = False
        self.confidence_RW[row] = 0.0
        self.open_R[row] = 0
        self.rest_R[row] = min(whole_blocks, limit)
        self.goal_R[row] = min(max_tokens, limit)
        self.ended_R[row] = False
        self.start_R[row] = 0
        self.forward_R[row] = 0
        self.block_size_R[row] = params.block_size
        self.max_open_R[row] = min(params.window, self.tokens_RW.shape[1])
        self.tau_add_R[row] = params.tau_add
        self.tau_act_R[row] = params.tau_act
        self.tau_conf_R[row] = params.tau_conf
        self.ends_RE[row] = -1
        self.ends_RE[row, : len(ends)] = torch.tensor(list(ends), dtype=torch.int64)

    def rows(self, index_R: Tensor) -> "Window":
        """A copy of the given rows."""
        return Window(*(getattr(self, f.name)[index_R] for f in fields(self)))

    def put(self, index_R: Tensor, rows: "Window") -> None:
        """Write back what `rows` returned. Settings never change while a request runs."""
        for name in _STATE:
            getattr(self, name)[index_R] = getattr(rows, name)


_STATE = (
    *("tokens_RW", "decided_RW", "full_RW", "confidence_RW"),
    *("open_R", "rest_R", "goal_R", "ended_R", "start_R", "forward_R"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward decided.

    Attributes:
        tokens_RW: int64, the window before it moved: position 0 is where the forward's window began.
        commit_R: int64, leading positions whose keys and values are final now.
        output_R: int64, leading positions of `tokens_RW` that leave as output: the committed ones
            or, when the request is done, everything up to its end.
        confidence_RW: float32, probabilities of `tokens_RW` when they were accepted.
        done_R: bool, nothing that could still be decided would change the output.
        accepted_RW: bool, positions decided by this forward.
    """

    tokens_RW: Tensor
    confidence_RW: Tensor
    commit_R: Tensor
    output_R: Tensor
    done_R: Tensor
    accepted_RW: Tensor


def block_of(position: Tensor, prompt_len: Tensor | int, block_size: Tensor | int) -> Tensor:
    """Attention block of a position: 0 for the prompt, 1, 2, ... for the generated blocks."""
    generated = 1 + torch.div(position - prompt_len, block_size, rounding_mode="floor")
    return torch.where(position < prompt_len, torch.zeros_like(generated), generated)


def may_attend(
    q_position: Tensor, k_position: Tensor, prompt_len: Tensor | int, block_size: Tensor | int
) -> Tensor:
    """The attention rule, bool: bidirectional inside a block, causal between blocks.

    Arguments broadcast: `may_attend(p[:, None], p[None, :], n, B)` is the dense mask.
    """
    return block_of(k_position, prompt_len, block_size) <= block_of(
        q_position, prompt_len, block_size
    )


def grow(window: Window) -> None:
    """Add and activate (ALGORITHM: iteration steps 1 and 2), in place, before a forward."""
    column_W = torch.arange(window.tokens_RW.shape[1], device=window.tokens_RW.device)
    block_R, open_R = window.block_size_R, window.open_R
    count_RW = window.decided_RW.cumsum(1)

    # Add. The last open block may be cut short by the end of what may be decoded.
    last_R = torch.where(open_R > 0, (open_R - 1).div(block_R, rounding_mode="floor") * block_R, 0)
    fraction_R = _fraction(count_RW, last_R, open_R)
    wanted_R = ~window.ended_R & ((open_R == 0) | (fraction_R >= window.tau_add_R))
    limit_R = torch.minimum(window.rest_R, window.max_open_R)
    grown_R = torch.minimum(last_R + torch.where(open_R > 0, 2, 1) * block_R, limit_R)
    window.open_R = torch.where(wanted_R & (open_R < limit_R), grown_R, open_R)

    # Activate. What precedes the window is decided, so its first block is always fully activated.
    start_RW = column_W.div(block_R[:, None], rounding_mode="floor") * block_R[:, None]
    previous_RW = (start_RW - block_R[:, None]).clamp(min=0)
    fraction_RW = (_before(count_RW, start_RW) - _before(count_RW, previous_RW)) / (
        block_R[:, None].double()
    )
    filled_RW = (start_RW == 0) | (fraction_RW >= window.tau_act_R[:, None])
    window.full_RW = (window.full_RW | filled_RW) & (column_W < window.open_R[:, None])


def advance(
    window: Window,
    proposal_RW: Tensor,
    confidence_RW: Tensor,
    mask_id: int,
    width_R: Tensor | None = None,
) -> Step:
    """Accept and commit (ALGORITHM: iteration steps 4 and 5), in place, after a forward.

    Args:
        window: what went into the forward, as `grow` left it.
        proposal_RW: int64, proposed tokens; read at undecided open positions only.
        confidence_RW: float32, their probabilities. NaN counts as 0.
        mask_id: the mask token, written where the window moves over.
        width_R: int64, positions that were in the forward, when fewer than the open ones. Blocks
            that were not there as a whole keep their state and wait.
    """
    device, width = window.tokens_RW.device, window.tokens_RW.shape[1]
    column_W = torch.arange(width, device=device)
    block_RW = column_W.div(window.block_size_R[:, None], rounding_mode="floor")
    decided_in_RW = window.decided_RW

    present_R = window.open_R
    if width_R is not None:
        whole_R = width_R.div(window.block_size_R, rounding_mode="floor") * window.block_size_R
        present_R = torch.where(width_R < present_R, whole_R, present_R)
    masked_RW = (column_W < present_R[:, None]) & ~decided_in_RW

    # Accept. If any proposal of a block passes the threshold its best one does, so a fully activated
    # block may take its best one without asking. Of equals the first wins.
    candidate_RW = torch.where(masked_RW, confidence_RW.nan_to_num(0.0), -1.0)
    best_RW = torch.full_like(candidate_RW, -1.0).scatter_reduce(1, block_RW, candidate_RW, "amax")
    is_best_RW = masked_RW & (candidate_RW == best_RW.gather(1, block_RW))
    first_RW = torch.full_like(block_RW, width).scatter_reduce(
        1, block_RW, torch.where(is_best_RW, column_W, width), "amin"
    )
    forced_RW = window.full_RW & (column_W == first_RW.gather(1, block_RW))
    accepted_RW = masked_RW & ((candidate_RW > window.tau_conf_R[:, None]) | forced_RW)
    window.tokens_RW = torch.where(accepted_RW, proposal_RW, window.tokens_RW)
    window.confidence_RW = torch.where(accepted_RW, candidate_RW, window.confidence_RW)
    window.decided_RW = decided_in_RW | accepted_RW

    # End. The first decided end token closes the window behind its block at once: later blocks
    # cannot influence earlier ones.
    is_end_RW = (window.tokens_RW[:, :, None] == window.ends_RE[:, None, :]).any(-1)
    is_end_RW &= window.decided_RW & (column_W < window.goal_R[:, None])
    end_R = torch.where(is_end_RW, column_W, width).amin(1)
    window.ended_R = end_R < width
    behind_R = (end_R.div(window.block_size_R, rounding_mode="floor") + 1) * window.block_size_R
    open_R = torch.where(window.ended_R, torch.minimum(window.open_R, behind_R), window.open_R)

    # Commit the leading blocks that went in whole, so that their keys and values are final.
    lead_in_R = _lead(decided_in_RW & (column_W < present_R[:, None]))
    whole_R = lead_in_R.div(window.block_size_R, rounding_mode="floor") * window.block_size_R
    commit_R = torch.where(lead_in_R >= window.rest_R, window.rest_R, whole_R)

    # Done when everything up to the end token, or up to the wanted length, is decided.
    need_R = torch.minimum(torch.where(window.ended_R, end_R + 1, window.rest_R), window.goal_R)
    done_R = (_lead(window.decided_RW) >= need_R) & (window.open_R > 0)
    step = Step(
        tokens_RW=window.tokens_RW,
        confidence_RW=window.confidence_RW,
        commit_R=commit_R,
        output_R=torch.where(done_R, need_R, torch.minimum(commit_R, need_R)),
        done_R=done_R,
        accepted_RW=accepted_RW,
    )

    # Move the window over what was committed.
    source_RW = column_W + commit_R[:, None]
    inside_RW = source_RW < open_R[:, None]
    source_RW = source_RW.clamp(max=width - 1)
    window.tokens_RW = torch.where(inside_RW, window.tokens_RW.gather(1, source_RW), mask_id)
    window.decided_RW = inside_RW & window.decided_RW.gather(1, source_RW)
    window.full_RW = inside_RW & window.full_RW.gather(1, source_RW)
    window.confidence_RW = torch.where(inside_RW, window.confidence_RW.gather(1, source_RW), 0.0)
    window.open_R = (open_R - commit_R).clamp(min=0)
    window.rest_R = window.rest_R - commit_R
    window.goal_R = window.goal_R - commit_R
    window.start_R = window.start_R + commit_R
    window.forward_R = window.forward_R + 1
    return step


def _before(count_RW: Tensor, column_RW: Tensor) -> Tensor:
    """Decided positions before each column, from the inclusive count."""
    return torch.where(column_RW > 0, count_RW.gather(1, (column_RW - 1).clamp(min=0)), 0)


def _fraction(count_RW: Tensor, start_R: Tensor, stop_R: Tensor) -> Tensor:
    """Decided fraction of the positions [start, stop) of each row, float64."""
    count_R = _before(count_RW, stop_R[:, None]) - _before(count_RW, start_R[:, None])
    return count_R[:, 0] / (stop_R - start_R).clamp(min=1).double()


def _lead(flag_RW: Tensor) -> Tensor:
    """How many leading columns of each row are True, int64."""
    width = flag_RW.shape[1]
    column_W = torch.arange(width, device=flag_RW.device)
    return torch.where(flag_RW, width, column_W).amin(1)
