# SPDX-License-Identifier: Apache-2.0
"""D2F decoding of many problems: the reference one by one, and all at once for a quick look.

Shapes: B problems, T tokens, W window positions, A positions behind the prompt, V vocabulary.
"""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from training.arithmetic import Problem
from training.batches import encode, whole_blocks
from training.evaluate import Score, grouped, score
from training.model import TinyQwen2, attention_bias
from vllm_d2f.d2f import D2FParams, Window, advance, grow, may_attend
from vllm_d2f.proposal import propose_greedy
from vllm_d2f.reference import generate, hf_forward


def by_reference(
    model: nn.Module,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerFast,
    params: D2FParams,
    max_tokens: int = 64,
) -> Score:
    """The figure to report. `model` is the exported checkpoint in transformers."""
    forward = hf_forward(model)
    outputs, forwards = [], []
    for problem in problems:
        ids, count = generate(
            forward,
            tokenizer(problem.question).input_ids,
            params,
            max_tokens=max_tokens,
            mask_id=tokenizer.mask_token_id,
            ends=[tokenizer.eos_token_id],
            shift=True,
        )
        outputs.append(ids)
        forwards.append(count)
    return score(problems, outputs, forwards, tokenizer)


@torch.inference_mode()
def batched(
    model: TinyQwen2,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerFast,
    params: D2FParams,
    max_tokens: int = 64,
) -> Score:
    """The same decoding for all problems of one length at once.

    Every forward runs over the whole canvas. Blocks that are not open yet hold masks there and
    change nothing, because no earlier block may attend to them.
    """
    outputs: list[list[int]] = []
    forwards: list[int] = []
    order: list[Problem] = []
    mask_id, end = tokenizer.mask_token_id, tokenizer.eos_token_id
    for group in grouped(problems):
        batch = encode(group, tokenizer, 0)
        P, B = batch.prompt_len, len(group)
        room = whole_blocks(max_tokens, params.block_size)
        window = Window.empty(B, params.window, 1, mask_id)
        for row in range(B):
            limits = {"max_tokens": max_tokens, "limit": room}
            window.start(row, params, **limits, ends=[end], mask_id=mask_id)
        ids_BT = torch.full((B, P + room), mask_id)
        ids_BT[:, :P] = batch.ids_BT[:, :P]
        position_T = torch.arange(P + room)
        bias_1TT = attention_bias(
            may_attend(position_T[:, None], position_T[None], P, params.block_size)
        )[None]
        committed_B = torch.zeros(B, dtype=torch.int64)
        counts = [0] * B
        results: list[list[int]] = [[] for _ in range(B)]
        live = torch.arange(B)
        column_W = torch.arange(params.window)
        while len(live):
            now = window.rows(live)
            grow(now)
            # Window column w of a row is position P + committed + w; what lies behind the canvas
            # is never open.
            place_BW = (P + committed_B[live, None] + column_W).clamp(max=P + room - 1)
            open_BW = column_W < now.open_R[:, None]
            rows_B1 = torch.arange(len(live))[:, None].expand(place_BW.shape)
            canvas_BT = ids_BT[live]
            canvas_BT[rows_B1[open_BW], place_BW[open_BW]] = now.tokens_RW[open_BW]
            logits_BAV = model.lm_head(model.hidden(canvas_BT, bias_1TT)[:, P - 1 : -1]).float()
            token_N, sure_N = propose_greedy(logits_BAV.flatten(0, 1), mask_id)
            token_BA, sure_BA = token_N.view(len(live), room), sure_N.view(len(live), room)
            step = advance(
                now, token_BA.gather(1, place_BW - P), sure_BA.gather(1, place_BW - P), mask_id
            )
            for i, row in enumerate(live.tolist()):
                seen = int(step.output_R[i] if step.done_R[i] else step.commit_R[i])
                tokens = step.tokens_RW[i, :seen]
                at = P + int(committed_B[row])
                ids_BT[row, at : at + seen] = tokens
                results[row] += tokens.tolist()
                committed_B[row] += seen
                counts[row] += 1
            window.put(live, now)
            live = live[~step.done_R]
        outputs += results
        forwards += counts
        order += group
    return score(order, outputs, forwards, tokenizer)
