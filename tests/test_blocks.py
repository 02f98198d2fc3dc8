# SPDX-License-Identifier: Apache-2.0
"""Virtual sequences give exactly the dense rule for any mix of prompts, windows, recomputation."""

import numpy as np
import pytest
import torch

from vllm_d2f.blocks import NO_PROMPT_END, block_sequences
from vllm_d2f.d2f import may_attend


def allowed(start, stop, sequences, request):
    """Return the mask [queries, keys] that the virtual sequences of one request grant."""
    grants = np.zeros((stop - start, stop), dtype=bool)
    row = 0
    for s in np.flatnonzero(sequences.request_S == request):
        queries = sequences.query_start_S1[s + 1] - sequences.query_start_S1[s]
        grants[row : row + queries, : sequences.kv_len_S[s]] = True
        row += queries
    assert row == stop - start
    return grants


@pytest.mark.parametrize("seed", range(40))
def test_equals_dense_rule(seed):
    rng = np.random.default_rng(seed)
    num_reqs = int(rng.integers(1, 9))
    prompt = rng.integers(1, 40, num_reqs)
    block = rng.integers(1, 20, num_reqs)
    start, stop = np.zeros((2, num_reqs), dtype=np.int32)
    for r in range(num_reqs):
        phase = rng.integers(4)
        if phase == 0:  # the whole prompt
            stop[r] = prompt[r]
        elif phase == 1:  # a window, the last block possibly cut short
            start[r] = prompt[r] + block[r] * rng.integers(0, 4)
            stop[r] = start[r] + rng.integers(1, 60)
        elif phase == 2:  # prompt and committed blocks after a preemption
            stop[r] = prompt[r] + block[r] * rng.integers(0, 4)
        else:  # the tail behind cached pages
            stop[r] = prompt[r] + block[r] * rng.integers(0, 4)
            start[r] = rng.integers(0, stop[r])
    sequences = block_sequences(start, stop, prompt, block)
    assert sequences.query_start_S1[-1] == (stop - start).sum()
    assert (np.diff(sequences.query_start_S1) > 0).all()
    for r in range(num_reqs):
        position = torch.arange(stop[r])
        dense = may_attend(position[:, None], position[None, :], int(prompt[r]), int(block[r]))
        # Keys beyond `stop` do not exist, so a block cut short ends there.
        np.testing.assert_array_equal(
            allowed(start[r], stop[r], sequences, r), dense[start[r] :].numpy()
        )


@pytest.mark.parametrize("seed", range(10))
def test_block_causal_prompt_equals_dense_rule(seed):
    rng = np.random.default_rng(seed)
    prompt, block, inner = (int(rng.integers(1, n)) for n in (50, 12, 20))
    stop = prompt + block * int(rng.integers(0, 4))
    start = int(rng.integers(0, stop))
    sequences = block_sequences(*(np.array([x]) for x in (start, stop, prompt, block, inner)))
    position = torch.arange(stop)
    dense = may_attend(position[:, None], position[None, :], prompt, block, inner)
    np.testing.assert_array_equal(allowed(start, stop, sequences, 0), dense[start:].numpy())


def test_block_causal_prompt():
    sequences = block_sequences(
        np.array([0, 8]), np.array([10, 24]), np.array([10, 20]), np.array([4, 4]), np.array([4, 4])
    )
    assert sequences.kv_len_S.tolist() == [4, 8, 10, 12, 16, 20, 24]
    assert sequences.query_start_S1.tolist() == [0, 4, 8, 10, 14, 18, 22, 26]


def test_row_without_a_request_is_one_block():
    sequences = block_sequences(
        np.array([0]), np.array([300]), np.array([NO_PROMPT_END]), np.array([1])
    )
    assert sequences.kv_len_S.tolist() == [300]
