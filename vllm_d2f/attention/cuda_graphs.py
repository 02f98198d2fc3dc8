# SPDX-License-Identifier: Apache-2.0
"""Which steps a FULL CUDA graph can replay, and which graphs are captured.

A graph fixes how many sequences attention runs over and how many queries each has. A window of b
blocks is b sequences, so a graph for R requests with b open blocks each has R * b sequences of one
block; fewer requests are filled up with empty ones. Steps of another form (a prompt, windows of
different widths, another block size, a last block cut short) run piecewise.

Shape suffixes: R requests, S block sequences.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_d2f.blocks import BlockSequences


class Shape(NamedTuple):
    """A captured graph: `num_reqs` queries of `width` positions each."""

    num_reqs: int
    width: int


def shapes(block_size: int, widest: int, max_num_seqs: int, max_tokens: int) -> list[Shape]:
    """List the graphs to capture: 1, 2, 3 ... blocks by 1, 2, 4, 8 ... requests.

    Args:
        block_size: of the served model; requests that choose another run piecewise.
        widest: positions of the widest query without its prompt.
        max_tokens: positions of the largest graph (vLLM's `max_cudagraph_capture_size`).
    """
    counts = [1 << n for n in range(max_num_seqs.bit_length()) if 1 << n < max_num_seqs]
    return [
        Shape(count, width)
        for width in range(block_size, widest + 1, block_size)
        for count in (*counts, max_num_seqs)
        if count * width <= max_tokens
    ]


def whole_blocks(
    start_R: NDArray[np.integer],
    length_R: NDArray[np.integer],
    origin_R: NDArray[np.integer],
    block_size_R: NDArray[np.integer],
    block_size: int,
) -> bool:
    """Return whether all queries are whole blocks of the served size, and equally many.

    Args:
        start_R, length_R: positions of the query.
        origin_R: the position from which the request's blocks are counted.
        block_size_R: of the request.
    """
    answer_R = start_R - origin_R
    return bool(
        length_R[0] % block_size == 0
        and (length_R == length_R[0]).all()
        and (block_size_R == block_size).all()
        and (answer_R >= 0).all()
        and (answer_R % block_size == 0).all()
    )


def fill_up(sequences: BlockSequences, size: int) -> BlockSequences:
    """Fill up to `size` sequences with some that have no queries and no keys."""
    missing = size - len(sequences.request_S)
    if missing < 0:
        raise ValueError(f"{len(sequences.request_S)} sequences in a graph of {size}")
    if not missing:
        return sequences
    return BlockSequences(
        np.pad(sequences.request_S, (0, missing)),
        np.pad(sequences.query_start_S1, (0, missing), mode="edge"),
        np.pad(sequences.kv_len_S, (0, missing)),
    )
