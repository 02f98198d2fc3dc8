# SPDX-License-Identifier: Apache-2.0
"""Sampling: probabilities against a plain softmax, draws against their distribution."""

import pytest
import torch

from vllm_d2f.sampling.sample import Sampling, gumbel, sample, sample_drawn, sample_greedy

MASK = 3


def sampling(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None):
    out = Sampling.greedy(rows)
    out.temperature_R[:] = temperature
    out.top_k_R[:] = top_k
    out.top_p_R[:] = top_p
    out.min_p_R[:] = min_p
    out.seed_R = torch.arange(rows) if seed is None else torch.full((rows,), seed)
    return out


def plain_distribution(logits_V, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Return the same rules, one row at a time, in float64."""
    logits = logits_V.double() / temperature
    logits[MASK] = -torch.inf
    p = logits.softmax(-1)
    p[p < min_p * p.max()] = 0
    order = p.argsort(descending=True, stable=True)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    total = 0.0
    for rank, token in enumerate(order.tolist()):
        if rank and total >= top_p:
            p[token] = 0
        total += p[token].item()
    return p / p.sum()


def test_greedy_equals_softmax_and_never_samples_the_mask():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, MASK] += 5
    expected = logits.double().clone()
    expected[:, MASK] = -torch.inf
    expected = expected.softmax(-1)
    token, confidence = sample_greedy(logits, MASK)
    assert (token == expected.argmax(-1)).all()
    torch.testing.assert_close(confidence.double(), expected.amax(-1), rtol=1e-5, atol=1e-7)
    assert (token != MASK).all()


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(rule):
    logits_V = torch.tensor([1.0, 2.0, 0.5, 4.0, -1.0, 1.5, 0.0, 2.2])
    rows = 20_000
    expected = plain_distribution(logits_V.clone(), **rule)
    token, confidence = sample_drawn(
        logits_V.expand(rows, -1),
        MASK,
        sampling(rows, **rule),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
    )
    share = torch.bincount(token, minlength=8).double() / rows
    assert (share[expected == 0] == 0).all()
    torch.testing.assert_close(share, expected, rtol=0, atol=0.015)
    torch.testing.assert_close(confidence.double(), expected[token], rtol=1e-4, atol=1e-6)


def test_draws_depend_on_seed_position_and_forward_only():
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    logits[1:] = logits[0]
    position = torch.tensor([4, 4, 5, 4, 4, 4])
    forward = torch.tensor([2, 2, 2, 3, 2, 2])
    rule = sampling(6, temperature=2.0, seed=9)
    rule.seed_R[4] = 10
    together, _ = sample_drawn(logits, MASK, rule, position, forward)
    alone = [
        sample_drawn(
            logits[i : i + 1],
            MASK,
            rule.rows(torch.tensor([i])),
            position[i : i + 1],
            forward[i : i + 1],
        )[0].item()
        for i in range(6)
    ]
    assert together.tolist() == alone
    assert together[0] == together[1] == together[5]
    noise = gumbel(rule.seed_R, position, forward, torch.arange(100).expand(6, -1))
    for other in (2, 3, 4):
        assert not torch.equal(noise[0], noise[other])


def test_gumbel_moments():
    noise = gumbel(*(torch.arange(300),) * 3, torch.arange(1000).expand(300, -1)).double()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.std() - 1.2825) < 0.01
    corr = torch.corrcoef(noise[:8])
    assert (corr - torch.eye(8)).abs().max() < 0.15


def test_nan_logits_give_confidence_zero():
    logits = torch.full((2, 8), torch.nan)
    assert sample_greedy(logits.clone(), MASK)[1].tolist() == [0, 0]
    zero = torch.zeros(2, dtype=torch.int64)
    assert sample_drawn(logits, MASK, sampling(2), zero, zero)[1].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_confidences(dtype):
    """The probability of the logits as they are, not of a sum rounded to their precision."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 500, generator=generator) * 4 + 15).to(dtype)
    expected = logits.double()
    expected[:, 3] = -torch.inf
    _, confidence = sample_greedy(logits, 3)
    torch.testing.assert_close(
        confidence.double(), expected.softmax(-1).max(-1).values, rtol=1e-5, atol=1e-7
    )


def test_rows_of_both_kinds_are_those_of_either():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(12, 40, generator=generator) * 3
    rule = sampling(12, temperature=0.8, top_k=9)
    rule.temperature_R[::3] = 0
    at = torch.arange(12)
    token, confidence = sample(logits.clone(), MASK, rule, at, at % 4)
    greedy = sample_greedy(logits.clone(), MASK)
    drawn = sample_drawn(logits, MASK, sampling(12, temperature=0.8, top_k=9), at, at % 4)
    for row in range(12):
        want = drawn if row % 3 else greedy
        assert token[row] == want[0][row] and confidence[row] == want[1][row]
    assert all(map(torch.equal, sample(logits.clone(), MASK), greedy))
    with pytest.raises(ValueError, match="position_N"):
        sample(logits, MASK, rule)
