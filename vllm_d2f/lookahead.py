# SPDX-License-Identifier: Apache-2.0
"""LoPA's lookahead branches (arXiv 2512.16229) over the reference loop. The engine has none.

Each round runs a forward over several branches of the same answer. The anchor is the answer so far;
a lookahead is a copy of it with one more token, at a position that the anchor left masked. The
branch whose masked positions are the surest wins, makes a step of D2F on the logits of this
forward, and the others are dropped. With positions in doubt, a round thus decodes a token more than
D2F does, if the guess makes the rest of the window surer.

Sure means a high negative entropy: it ranks branches, the positions to look ahead at, and the
position that an active block must take. `tau_conf` is compared with a probability, as in D2F.

Shape suffixes: B branches, the anchor last; W window positions, V vocabulary, R rows of a window.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_d2f.d2f import Beginning, D2FParams, Window, add, may_attend, step
from vllm_d2f.reference import Forward
from vllm_d2f.sampling.sample import sample_greedy


class Lookahead(NamedTuple):
    """An answer with its end token, and what each round did.

    Attributes:
        tokens: the answer.
        scores: per round, the score of each branch in the order of the branches.
        winners: per round, 0 if the anchor won, else the place of the lookahead, from 1.
    """

    tokens: list[int]
    scores: list[list[float]]
    winners: list[int]

    @property
    def rounds(self) -> int:
        """Forwards, each of them over all branches."""
        return len(self.winners)


def generate(
    forward: Forward,
    prompt: Sequence[int],
    params: D2FParams,
    *,
    lookaheads: int,
    margin: float = 0.0,
    max_tokens: int,
    mask_id: int,
    ends: Sequence[int],
    shift: bool,
    run_on: bool = False,
    prompt_block: int | None = None,
) -> Lookahead:
    """Decode one request, greedy, by the rule `threshold`.

    Args:
        params: `min_per_step` is 1, as in LoPA.
        lookaheads: most branches beside the anchor.
        margin: by how much a lookahead must beat the anchor, in nats of mean negative entropy. 0 is
            LoPA, where a lookahead also wins a tie.
        others: as for `reference.decode`.
    """
    window = Window.empty(1, params.window, max(len(ends), 1), mask_id)
    limit = max_tokens + params.block_size
    window.start([0], [Beginning(params, max_tokens, limit, () if run_on else ends)], mask_id)
    before = list(prompt)  # the window: the prompt and all committed tokens
    scores: list[list[float]] = []
    winners: list[int] = []
    while True:
        if run_on:
            _open_no_more(window, before[len(prompt) :], ends)
        add(window)
        rows = range(len(window.open_R))
        cut = (len(prompt), params.block_size, prompt_block)
        logits_BWV = [_logits(forward, before, window, row, cut, shift) for row in rows]
        # The mask token is never proposed, and counts in no distribution.
        token_BW, p_BW = zip(*(sample_greedy(one, mask_id) for one in logits_BWV), strict=True)
        sure_BW = [_negative_entropy(logits_WV) for logits_WV in logits_BWV]
        scores.append([_score(window, row, sure_BW[row]) for row in rows])
        needed = [*scores[-1][:-1], scores[-1][-1] + margin]
        best = needed.index(max(needed))
        winners.append((best + 1) % len(rows))

        # One step of D2F. What is not above the threshold is ranked by its entropy.
        winner, tau = window.rows(torch.tensor([best])), params.tau
        confidence_W = torch.where(p_BW[best] > tau, p_BW[best], tau * sure_BW[best].exp())
        token_1W = _padded(token_BW[best], params.window)
        result = step(winner, token_1W, _padded(confidence_W, params.window), mask_id)
        done, committed = bool(result.done_R), int(result.commit_R)
        before += result.tokens_RW[0, : int(result.emit_R) if done else committed].tolist()
        if done:
            return Lookahead(before[len(prompt) :], scores, winners)
        token_W = token_1W[0].roll(-committed)
        sure_W = _padded(sure_BW[best], params.window)[0].roll(-committed)
        window = _branches(winner, token_W, sure_W, lookaheads, () if run_on else ends)


def _open_no_more(window: Window, committed: Sequence[int], ends: Sequence[int]) -> None:
    """Open no block behind an end token, and decode on to the end of those that are open."""
    for row, (tokens_W, decoded_W) in enumerate(
        zip(window.tokens_RW, window.decoded_RW, strict=True)
    ):
        if not set(ends).isdisjoint([*committed, *tokens_W[decoded_W].tolist()]):
            window.rest_R[row] = window.open_R[row]
            window.goal_R[row] = min(window.goal_R[row], window.open_R[row])


def _logits(
    forward: Forward,
    before: list[int],
    window: Window,
    row: int,
    cut: tuple[int, int, int | None],
    shift: bool,
) -> Tensor:
    """Return the logits of a branch's open window, float32 [W, V].

    Args:
        cut: where blocks begin, their size, and that of a prompt's blocks.
    """
    open_ = int(window.open_R[row])
    tokens_T = torch.cat([torch.tensor(before), window.tokens_RW[row, :open_]])
    position_T = torch.arange(len(tokens_T))
    mask_TT = may_attend(position_T[:, None], position_T[None, :], *cut)
    return forward(tokens_T, mask_TT)[position_T[len(before) :] - int(shift)].float()


def _negative_entropy(logits_WV: Tensor) -> Tensor:
    p_WV = logits_WV.softmax(-1)
    return (p_WV * (p_WV + 1e-10).log()).sum(-1)


def _score(window: Window, row: int, sure_W: Tensor) -> float:
    """Return the mean over a branch's masked positions; 1, which beats all, without any."""
    masked_W = window.masked_RW[row, : len(sure_W)]
    return float(sure_W[masked_W].mean()) if masked_W.any() else 1.0


def _padded(values_W: Tensor, width: int) -> Tensor:
    """Make one row of a window."""
    return torch.nn.functional.pad(values_W, (0, width - len(values_W)))[None]


def _branches(
    anchor: Window, token_W: Tensor, sure_W: Tensor, lookaheads: int, ends: Sequence[int]
) -> Window:
    """Return copies of the anchor with one more token each, the surest first, and the anchor."""
    masked_W = anchor.masked_RW[0]
    surest_W = sure_W.masked_fill(~masked_W, -torch.inf).sort(descending=True, stable=True).indices
    columns = surest_W[: min(lookaheads, int(masked_W.sum()))].tolist()
    window = anchor.rows(torch.zeros(len(columns) + 1, dtype=torch.int64))
    for row, column in enumerate(columns):
        # Not emitted: the block is committed, and an end looked for, if this branch wins.
        window.tokens_RW[row, column] = token_W[column]
        window.decoded_RW[row, column] = True
        if int(token_W[column]) in ends:
            size = int(window.block_R[row])
            for limit_R in (window.rest_R, window.open_R):
                limit_R[row] = min(int(limit_R[row]), (column // size + 1) * size)
    return window
