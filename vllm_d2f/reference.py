# SPDX-License-Identifier: Apache-2.0
"""The reference that the engine is tested against: D2F decoding of one request.

Every forward recomputes the whole sequence under a dense mask, without a cache and without a batch.
The engine must give the same tokens with the same number of forwards.

Shape suffixes: T positions of the sequence, V vocabulary, W open window positions.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_d2f.d2f import Beginning, D2FParams, Window, activated, add, may_attend, step
from vllm_d2f.sampling.request_sampler import RequestSampler
from vllm_d2f.sampling.sample import Sampling, sample_drawn, sample_greedy

Forward = Callable[[Tensor, Tensor], Tensor]
"""(tokens_T int64, mask_TT bool, True = may attend) -> logits_TV."""

MARGIN = 2.0**-8
"""A decision that no difference of this size changes is clear."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One request after one forward.

    Attributes:
        forward: 1 for the first forward.
        tokens: the answer so far, one entry per position of a committed or open block.
        decided: whether each position is decoded.
        confidences: the probability of each token when it was accepted (exp(-entropy) with the rule
            `entropy`), 0 where masked.
        logprobs: the log-probability of each token at that time, before all rules of the request,
            if its sampler keeps them.
        accepted: positions decoded by this forward.
        activated: per open block, whether it was fully activated in this forward.
        committed: positions of the answer whose keys and values are final.
        margin: by how much confidences would have to differ for this forward to decide otherwise,
            found to a factor of 2 and up to `MARGIN`. Below the rounding error of float32 this is a
            tie, and another order of summation may decide it the other way. Infinite for drawn
            tokens and for requests with a sampler of their own.
        nonfinite: proposals of this forward without a probability, because their logits held a
            NaN or an infinity.
        block_size: positions per block.
        done: this is the last frame, and `tokens` ends where the answer ends.
    """

    forward: int
    tokens: list[int]
    decided: list[bool]
    confidences: list[float]
    logprobs: list[float]
    accepted: list[int]
    activated: list[bool]
    committed: int
    margin: float
    nonfinite: int
    block_size: int
    done: bool


def hf_forward(model: torch.nn.Module) -> Forward:
    """Return a transformers causal LM (see `vllm_d2f.models.hf`) as a `Forward`."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def forward(tokens_T: Tensor, mask_TT: Tensor) -> Tensor:
        # A 4-D mask switches the causal default of transformers off.
        out = model(
            tokens_T[None].to(device),
            attention_mask=mask_TT[None, None].to(device),
            use_cache=False,
        )
        return out.logits[0]

    return forward


def decode(
    forward: Forward,
    prompt: Sequence[int],
    params: D2FParams,
    *,
    max_tokens: int,
    mask_id: int,
    ends: Sequence[int],
    shift: bool,
    max_len: int | None = None,
    run_on: bool = False,
    sampling: Sampling | None = None,
    prompt_block: int | None = None,
    block_origin: str = "prompt_end",
    request_sampler: RequestSampler | None = None,
    widths: Sequence[int] | None = None,
) -> Iterator[Frame]:
    """Decode one request, one frame per forward.

    Args:
        forward: the model.
        prompt: token ids, at least one.
        params: D2F settings; `max_blocks` limits the open blocks.
        max_tokens: most tokens of the answer.
        mask_id: the mask token.
        ends: end tokens; the answer stops after the first one. Empty: ignore them all.
        shift: the output at position i - 1 predicts position i; else the one at i.
        max_len: the model's longest sequence; a last block that does not fit is cut short.
        run_on: decode on behind an end token to the end of the blocks opened so far, as the
            authors' loop does.
        sampling: one entry; None or temperature 0 is greedy.
        prompt_block: positions per prompt block of a model with a block-causal prompt.
        block_origin: where blocks begin. "prompt_end": the first block begins behind the prompt.
            "zero": blocks begin at multiples of the block size from position 0, in a block-causal
            prompt too, and the last tokens of the prompt may share a block with the answer.
        request_sampler: samples for a request with penalties, a grammar or log-probabilities; made
            anew for this call, from the same `sampling`.
        widths: positions of the window that each forward computes, whole blocks from its begin, as
            an adaptive window recorded them; None: all open blocks.

    Raises:
        ValueError: the prompt is empty, or leaves no room for an answer.
    """
    if not prompt:
        raise ValueError("the prompt is empty; D2F needs at least one prompt token")
    if max_len is not None and len(prompt) >= max_len:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves no room for an answer in max_len = {max_len}"
        )
    if request_sampler is not None and request_sampler.decoder is not None:
        params = replace(params, sub_block_size=0)  # its order is that of the text
    prompt = list(prompt)
    tail = len(prompt) % params.block_size if block_origin == "zero" else 0
    limit = max_len - len(prompt) if max_len is not None else max_tokens + params.block_size
    window = Window.empty(1, params.window, max(len(ends), 1), mask_id)
    first = Beginning(
        params,
        max_tokens=max_tokens,
        limit=limit,
        ends=() if run_on else ends,
        tail=prompt[len(prompt) - tail :],
    )
    window.start([0], [first], mask_id)
    before = prompt[: len(prompt) - tail]  # the window: the prompt and all committed tokens
    origin = 0 if block_origin == "zero" else len(prompt)
    if block_origin == "zero":
        prompt_block = None  # a prompt of such blocks is cut like the answer
    by_entropy = params.accept == "entropy"
    greedy = request_sampler is None and (sampling is None or float(sampling.temperature_R) == 0)
    confidences: dict[int, float] = {}
    logprobs: dict[int, float] = {}
    for forwards in itertools.count(1):
        answer = before[len(prompt) :]
        if run_on and any(token in ends for token in answer + _decoded(window)):
            window.rest_R[:] = window.open_R
            window.goal_R[:] = torch.minimum(window.goal_R, window.open_R)
        add(window)
        open_, start = int(window.open_R), int(window.start_R)
        if widths is not None:
            open_ = min(open_, widths[forwards - 1])
        tokens_T = torch.cat([torch.tensor(before, dtype=torch.int64), window.tokens_RW[0, :open_]])
        position_T = torch.arange(len(tokens_T))
        mask_TT = may_attend(
            position_T[:, None], position_T[None, :], origin, params.block_size, prompt_block
        )
        rows = position_T[len(before) :] - int(shift)
        logits_WV = forward(tokens_T, mask_TT)[rows].float()
        masked = window.candidate_RW[0, :open_].nonzero()[:, 0]
        token_W = torch.zeros(params.window, dtype=torch.int64)
        confidence_W = torch.full((params.window,), -1.0)  # nothing is known behind the forward
        entropy_W = torch.ones(open_, dtype=torch.bool) if by_entropy else None
        if request_sampler is not None:
            known = (before + _decoded(window))[len(prompt) :]
            request_sampler.begin_forward()
            token_W[masked], confidence_W[masked] = request_sampler.sample(
                logits_WV[masked],
                masked + start,
                window.forward_R,
                torch.tensor(known, dtype=torch.int64),
            )
        elif greedy:
            token_W[:open_], confidence_W[:open_] = sample_greedy(logits_WV, mask_id, entropy_W)
        else:
            assert sampling is not None
            token_W[:open_], confidence_W[:open_] = sample_drawn(
                logits_WV,
                mask_id,
                sampling.rows(torch.zeros(open_, dtype=torch.int64)),
                torch.arange(open_) + start,
                window.forward_R.expand(open_),
                entropy_W,
            )
        margin = _margin(window, logits_WV, confidence_W) if greedy else math.inf
        nonfinite = int((confidence_W[masked] == 0).sum())
        active = activated(window)[0, : open_ : params.block_size].tolist()
        result = step(window, token_W[None], confidence_W[None], mask_id)
        columns = result.accepted_RW[0].nonzero()[:, 0].tolist()
        for column in columns:
            confidences[start + column] = float(confidence_W[column])
            if request_sampler is not None and request_sampler.logprobs is not None:
                logprobs[start + column] = request_sampler.logprobs.at(start + column)
        done = bool(result.done_R)
        before += result.tokens_RW[0, : int(result.emit_R if done else result.commit_R)].tolist()
        live = slice(0, 0 if done else int(window.open_R))
        tokens = (before + window.tokens_RW[0, live].tolist())[len(prompt) :]
        decided = [True] * len(before) + window.decoded_RW[0, live].tolist()
        yield Frame(
            forward=forwards,
            tokens=tokens,
            decided=decided[len(prompt) :],
            confidences=[confidences.get(position, 0.0) for position in range(len(tokens))],
            logprobs=[logprobs.get(position, 0.0) for position in range(len(tokens))],
            accepted=[start + column for column in columns],
            activated=active,
            committed=max(len(before) - len(prompt), 0),
            margin=margin,
            nonfinite=nonfinite,
            block_size=params.block_size,
            done=done,
        )
        if done:
            return


def generate(*args, **kwargs) -> tuple[list[int], int]:
    """`decode` to its end: the answer's tokens (with the end token) and the number of forwards."""
    frame = None
    for frame in decode(*args, **kwargs):  # noqa: B007
        pass
    assert frame is not None
    return frame.tokens, frame.forward


def _margin(window: Window, logits_WV: Tensor, confidence_W: Tensor) -> float:
    """Return `Frame.margin`; in `logits_WV` the mask token is -inf."""
    active_RW = activated(window)
    masked_W = window.candidate_RW[0] & (window.column_W < len(logits_WV))
    if not masked_W.any():
        return math.inf

    def accepted(active_RW: Tensor, shift: float = 0.0) -> Tensor:
        shifted_W = (confidence_W + shift).clamp(min=0)
        return window.accept(torch.where(masked_W, shifted_W, -1.0)[None], active_RW)[0]

    # Higher confidences never make fewer positions pass. How many pass is what shifting all of
    # them tells; which ones is told by the least confident one that passes and the next.
    margin, none_RW = MARGIN, torch.zeros_like(active_RW)
    while margin > 0 and not accepted(none_RW, -margin).equal(accepted(none_RW, margin)):
        margin = margin / 2 if margin > 1e-9 else 0.0
    taken_W = accepted(active_RW)
    for start in range(0, int(window.open_R), int(window.block_R)):
        block_W = masked_W & (window.block_RW[0] == start)
        best = confidence_W[block_W].sort(descending=True).values
        count = int(taken_W[block_W].sum())
        if 0 < count < len(best):
            margin = min(margin, float(best[count - 1] - best[count]))
    if taken_W.any():
        top_W2 = logits_WV.softmax(-1).topk(2, dim=-1).values
        margin = min(margin, float((top_W2[:, 0] - top_W2[:, 1])[taken_W[: len(top_W2)]].min()))
    return margin


def _decoded(window: Window) -> list[int]:
    return window.tokens_RW[0][window.decoded_RW[0]].tolist()
