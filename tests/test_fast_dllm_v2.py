# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2: what its decoding does otherwise than D2F, and the runs of its own code."""

from dataclasses import replace

import pytest
import torch
from published_runs import DATA, END, published_runs

from vllm_d2f.d2f import Beginning, D2FParams, Window, add, step
from vllm_d2f.models.hf import load_hf
from vllm_d2f.reference import decode, generate, hf_forward

MASK = 199
PARAMS = D2FParams(8, 2, tau_add=1.0, tau_conf=0.9, sub_block_size=4)
RUNS = published_runs("fast_dllm_v2")


@pytest.fixture(scope="module")
def model():
    hf_model, config = load_hf(DATA / "fast_dllm_v2")
    assert config.family.block_origin == "zero" and config.logits_shift
    return hf_forward(hf_model)


def common(max_tokens):
    return dict(max_tokens=max_tokens, mask_id=MASK, ends=[END], shift=True, block_origin="zero")


def test_runs_of_the_authors_code(model):
    for run in RUNS:
        tokens, forwards = generate(model, run.prompt, run.params, **common(run.goal))
        assert (tuple(tokens), forwards) == (run.answer, run.forwards)
    assert sum(END in run.answer for run in RUNS) > 10


def test_sure_positions_wait_for_their_sub_block():
    """Whatever the confidences: the first position alone, then one sub-block after the other."""
    window = Window.empty(1, 16, 1, MASK)
    window.start([0], [Beginning(PARAMS, 16, 99, [])], MASK)
    token, decoded = torch.ones(1, 16, dtype=torch.int64), []
    sure = torch.ones(1, 16)
    sure[0, ::8] = 0.01  # a block's first token is taken whatever its probability
    for _ in range(4):
        add(window)
        result = step(window, token, sure, MASK)
        decoded.append(result.accepted_RW[0].nonzero()[:, 0].tolist())
    # The forward that commits the first block decodes the first position of the second.
    assert decoded == [[0], [1, 2, 3], [4, 5, 6, 7], [8]]
    assert int(result.commit_R) == 8 and int(window.open_R) == 8


def test_a_sub_block_longer_than_the_block_is_the_block():
    """Also one that fits no tensor: it comes with a request."""
    rows = [Beginning(replace(PARAMS, sub_block_size=size), 20, 20, [2]) for size in (8, 1 << 70)]
    assert rows[0].counters(16, 1) == rows[1].counters(16, 1)


def test_rows_with_and_without_sub_blocks_stand_beside_each_other():
    window = Window.empty(2, 8, 1, MASK)
    for row, sub in enumerate((0, 4)):
        params = D2FParams(8, 1, sub_block_size=sub)
        window.start([row], [Beginning(params, 8, 99, [])], MASK)
    add(window)
    assert window.candidate_RW.sum(1).tolist() == [8, 1]
    window.decoded_RW[:, 0] = True
    assert window.candidate_RW.sum(1).tolist() == [7, 3]
    window.decoded_RW[:] = True
    assert window.candidate_RW.sum(1).tolist() == [0, 0]


def test_a_prompt_of_one_block_gives_the_first_token(model):
    """The authors' code forgets a prompt of exactly one block: it prefills longer ones only."""
    prompt = list(range(8))
    frame = next(iter(decode(model, prompt, PARAMS, **common(8))))
    block = torch.ones(8, 8, dtype=torch.bool)
    expected = model(torch.tensor(prompt), block)[-1].clone()
    expected[MASK] = -torch.inf
    assert frame.accepted == [0] and frame.tokens[0] == int(expected.argmax())


def test_a_mask_token_in_the_prompt_is_a_token(model):
    """The authors' code decodes it anew; here a prompt is never changed."""
    tokens, _ = generate(model, [5, MASK, 7], PARAMS, **common(9))
    assert len(tokens) <= 9 and MASK not in tokens
