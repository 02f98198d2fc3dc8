# SPDX-License-Identifier: Apache-2.0
"""Blocks: where they begin, and which positions attend to which.

The prompt is one block. The answer is cut into blocks of `block_size` positions that start where
the prompt ends. Attention is bidirectional inside a block and causal between blocks:

    position q attends to position k   exactly when   block_of(k) <= block_of(q)

The rule appears in two forms. `may_attend` is the dense mask, for the reference loop and for
training. `block_sequences` is the same rule for paged attention: one non-causal sequence per block,
which is exact and needs no mask. A test holds the two together.

Shape suffixes: R requests, S block sequences.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_PROMPT_END = np.int64(1) << 40
"""Prompt length of a row without a request: all its tokens are one block."""


def block_of(
    position: Tensor,
    prompt_len: Tensor | int,
    block_size: Tensor | int,
    prompt_block: int | None = None,
) -> Tensor:
    """Return the block of a position: 0 for the prompt, then 1, 2, ... for the answer's blocks.

    With `prompt_block` the prompt is block-causal too: it is cut from its start into blocks of that
    size, which are numbered so that the last one is 0.
    """
    answer = 1 + torch.div(position - prompt_len, block_size, rounding_mode="floor")
    if prompt_block is None:
        prompt = torch.zeros_like(answer)
    else:
        prompt = torch.div(position, prompt_block, rounding_mode="floor")
        prompt = prompt - (prompt_len - 1) // prompt_block
    return torch.where(position < prompt_len, prompt, answer)


def may_attend(
    query: Tensor,
    key: Tensor,
    prompt_len: Tensor | int,
    block_size: Tensor | int,
    prompt_block: int | None = None,
) -> Tensor:
    """Return whether a query position attends to a key position. Arguments broadcast.

    `may_attend(p[:, None], p[None, :], n, B)` is the dense mask of one request.
    """
    rule = (prompt_len, block_size, prompt_block)
    return block_of(key, *rule) <= block_of(query, *rule)


class BlockSequences(NamedTuple):
    """One row per attention block that has queries in this forward, in token order.

    Attributes:
        request_S: int64, row of the batch the block belongs to.
        query_start_S1: int32 [S + 1], its queries are tokens [query_start[s], query_start[s + 1]).
        kv_len_S: int32, keys from the request's first position up to the end of the block.
    """

    request_S: NDArray[np.int64]
    query_start_S1: NDArray[np.int32]
    kv_len_S: NDArray[np.int32]


def block_sequences(
    start_R: NDArray[np.integer],
    stop_R: NDArray[np.integer],
    prompt_len_R: NDArray[np.integer],
    block_size_R: NDArray[np.integer],
    prompt_block_R: NDArray[np.integer] | None = None,
) -> BlockSequences:
    """Cut each request's query positions [start, stop) at its block boundaries.

    Args:
        start_R, stop_R: positions in this forward, stop > start.
        prompt_len_R: where the generated blocks begin.
        block_size_R: positions per generated block.
        prompt_block_R: positions per prompt block for models trained with a block-causal prompt;
            None: the prompt is one block.
    """
    start_R, stop_R = start_R.astype(np.int64), stop_R.astype(np.int64)
    prompt_R = prompt_len_R.astype(np.int64)
    block_R = block_size_R.astype(np.int64)
    if prompt_block_R is None:
        # The prompt is one block, and an empty one none.
        prompt_block_R = prompt_R
        split_R = np.minimum(prompt_R, 1)
    else:
        prompt_block_R = np.minimum(prompt_block_R, np.maximum(prompt_R, 1))
        split_R = -(-prompt_R // prompt_block_R)

    # Blocks are numbered through prompt and answer: `split` of them before the answer begins.
    def block_at(position_R: NDArray[np.integer]) -> NDArray[np.integer]:
        answer_R = split_R + (position_R - prompt_R) // block_R
        if (position_R >= prompt_R).all():
            return answer_R
        in_prompt_R = position_R // np.maximum(prompt_block_R, 1)
        return np.where(position_R < prompt_R, in_prompt_R, answer_R)

    first_R = block_at(start_R)
    count_R = block_at(stop_R - 1) - first_R + 1
    request_S = np.arange(len(start_R)).repeat(count_R)
    # Blocks of the answer up to and including this one; 0 or less inside the prompt.
    before_R = first_R - split_R + 1 - (count_R.cumsum() - count_R)
    answer_S = before_R[request_S] + np.arange(len(request_S))
    prompt_S = prompt_R[request_S]
    end_S = prompt_S + answer_S * block_R[request_S]
    if (answer_S <= 0).any():
        in_prompt_S = (answer_S + split_R[request_S]) * prompt_block_R[request_S]
        end_S = np.where(answer_S <= 0, np.minimum(in_prompt_S, prompt_S), end_S)
    end_S = np.minimum(end_S, stop_R[request_S])
    # A request's queries lie side by side, so a block's begin where the one before ends.
    length_R = stop_R - start_R
    offset_R = length_R.cumsum() - length_R - start_R
    query_start_S1 = np.zeros(len(request_S) + 1, dtype=np.int32)
    query_start_S1[1:] = end_S + offset_R[request_S]
    return BlockSequences(request_S, query_start_S1, end_S.astype(np.int32))
