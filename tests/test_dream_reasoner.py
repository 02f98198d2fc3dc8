# SPDX-License-Identifier: Apache-2.0
"""DreamReasoner: its published loop, written from its description, on SDAR's tiny weights.

A block has `steps` forwards. Step s takes the positions above the threshold, or the n[s] most
confident ones if these are more, where n spreads the block evenly over the steps. The last step
takes every position that is left (`force_accept`).
"""

import random

import pytest
import torch
from checkpoints import write_dream_reasoner

from vllm_d2f.d2f import D2FParams
from vllm_d2f.models import FAMILIES
from vllm_d2f.models.hf import load_hf
from vllm_d2f.reference import generate, hf_forward

MASK = 199


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    hf_model, config = load_hf(write_dream_reasoner(tmp_path_factory.mktemp("dream_reasoner")))
    assert config.family is FAMILIES["DreamForCausalLM"]
    assert not config.logits_shift and config.head_dim == 16 and config.end_token_ids[0] == 198
    return hf_forward(hf_model)


def published_loop(forward, prompt, blocks, size, steps, tau):
    """Return the answer to the end of its last block, and the forwards that decoded it."""
    quota = [size // steps + (s < size % steps) for s in range(steps)]
    tokens, forwards, forced = list(prompt), 0, 0
    first = len(prompt) // size
    tokens += [None] * ((first + blocks) * size - len(prompt))
    for start in range(first * size, len(tokens), size):
        for step in range(steps):
            masked = [i for i in range(start, start + size) if tokens[i] is None]
            if not masked:
                break
            forwards += 1
            tokens_T = torch.tensor([MASK if t is None else t for t in tokens[: start + size]])
            block_T = torch.arange(len(tokens_T)) // size
            logits_TV = forward(tokens_T, block_T[None, :] <= block_T[:, None]).clone()
            logits_TV[:, MASK] = -torch.inf
            best = logits_TV.softmax(-1).max(-1)
            ranked = sorted(masked, key=lambda i: -float(best.values[i]))
            sure = [i for i in ranked if float(best.values[i]) > tau]
            take = sure if len(sure) >= max(1, quota[step]) else ranked[: max(1, quota[step])]
            if step == steps - 1:
                forced += len(masked) - len(take)
                take = masked
            for i in take:
                tokens[i] = int(best.indices[i])
    return tokens[len(prompt) :], forwards, forced


@pytest.mark.parametrize("size", [4, 16])
def test_the_last_step_finds_no_more_than_its_share(model, size):
    """So `force_accept` needs no setting: `min_per_step` alone gives the published decoding."""
    rng = random.Random(size)
    for steps in (size, size // 2, 1):
        for length, tau in ((1, 0.9), (size, 0.3), (size + 3, 1.0)):
            prompt = [rng.randrange(198) for _ in range(length)]
            expected, forwards, forced = published_loop(model, prompt, 2, size, steps, tau)
            assert forced == 0
            params = D2FParams(size, 1, tau_conf=tau, min_per_step=size // steps)
            got, count = generate(
                model, prompt, params, max_tokens=len(expected), mask_id=MASK, ends=(),
                shift=False, block_origin="zero",
            )  # fmt: skip
            # The first of the two blocks is committed by a forward of its own.
            assert (got, count) == (expected, forwards + 1)
