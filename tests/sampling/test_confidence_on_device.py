# SPDX-License-Identifier: Apache-2.0
"""The confidence kernel at the vocabularies of Dream and LLaDA, against float64.

Shape suffixes: N rows, V vocabulary.
"""

import pytest
import torch

from vllm_d2f.sampling.sample import Sampling, sample_drawn, sample_greedy

RULES = {"greedy": 2e-5, "temperature": 2e-5, "top_k": 2e-5, "top_p": 1e-3, "min_p": 1e-3}
"""Allowed relative error of a confidence. Where a limit is a sum or a quotient, its rounding
decides about the last token kept, whose weight is that of one token in a vocabulary."""


def sampling(rule: str, count: int, device: str):
    """Settings of rows under one rule; None: greedy."""
    if rule == "greedy":
        return None
    out = Sampling.greedy(count, device)
    out.temperature_R[:] = 0.8
    out.seed_R[:] = torch.arange(count, device=device) * 7919
    if rule == "top_k":
        out.top_k_R[:] = 50
    elif rule == "top_p":
        out.top_p_R[:] = 0.9
    elif rule == "min_p":
        out.min_p_R[:] = 0.05
    return out


def confidence_error(
    logits_NV: torch.Tensor,
    mask_id: int,
    token_N: torch.Tensor,
    confidence_N: torch.Tensor,
    how,
    counters_N: torch.Tensor,
) -> tuple[bool, float]:
    """Return whether the tokens are `proposal`'s, and the confidence's error against float64.

    The limits of a rule are applied in float64 as well; the token is taken as given.
    """
    plain_NV = logits_NV.float()
    if how is None:
        want_N, _ = sample_greedy(plain_NV.clone(), mask_id)
    else:
        want_N, _ = sample_drawn(plain_NV, mask_id, how, counters_N, counters_N % 7)
    exact_NV = plain_NV.double()
    exact_NV[:, mask_id] = -torch.inf
    if how is not None:
        # Scaled in float32 as the definition says; sums in float64.
        exact_NV = (plain_NV / how.temperature_R[:, None]).double()
        exact_NV[:, mask_id] = -torch.inf
        exact_NV = _limited(exact_NV, how)
    want = exact_NV.softmax(-1).gather(1, token_N[:, None])[:, 0]
    error = ((confidence_N.double() - want).abs() / want.clamp(min=1e-12)).max()
    return torch.equal(token_N, want_N), float(error)


def _limited(values_NV: torch.Tensor, how) -> torch.Tensor:
    """-inf where min_p, top_k or top_p leave a token out; ties keep the lower id."""
    floor_N1 = values_NV.amax(1, keepdim=True) + how.min_p_R.double().log()[:, None]
    values_NV = values_NV.masked_fill(values_NV < floor_N1, -torch.inf)
    sorted_NV, order_NV = values_NV.sort(dim=1, descending=True, stable=True)
    rank_V = torch.arange(values_NV.shape[1], device=values_NV.device)
    k_N1 = torch.where(how.top_k_R > 0, how.top_k_R, values_NV.shape[1])[:, None]
    sorted_NV = sorted_NV.masked_fill(rank_V >= k_N1, -torch.inf)
    before_NV = sorted_NV.softmax(1).cumsum(1) - sorted_NV.softmax(1)
    limit_N1 = torch.where(how.top_p_R < 1, how.top_p_R, 2.0).double()[:, None]
    sorted_NV = sorted_NV.masked_fill(before_NV >= limit_N1, -torch.inf)
    return torch.empty_like(values_NV).scatter_(1, order_NV, sorted_NV)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, 32, 128, 1024])
@pytest.mark.parametrize("size", [152064, 126464])
def test_the_kernel_agrees_with_float64(size, rows, rule):
    from vllm_d2f.sampling import confidence_kernel

    generator = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(rows, size, generator=generator, device="cuda")).to(torch.bfloat16)
    how, counters = sampling(rule, rows, "cuda"), torch.arange(rows, device="cuda")
    extra = () if how is None else (how, counters, counters % 7)
    token, confidence = confidence_kernel.sample(logits, size - 5, *extra)
    same, error = confidence_error(logits, size - 5, token, confidence, how, counters)
    assert same and error <= RULES[rule]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_kernels_entropy_agrees_with_float64(rows, scale):
    from vllm_d2f.sampling import confidence_kernel

    size, generator = 152064, torch.Generator("cuda").manual_seed(0)
    logits_NV = scale * torch.randn(rows, size, generator=generator, device="cuda")
    entropy_N = torch.ones(rows, dtype=torch.bool, device="cuda")
    _, confidence = confidence_kernel.sample(logits_NV, size - 5, entropy_N=entropy_N)
    logits_NV[:, size - 5] = -torch.inf
    want = torch.special.entr(logits_NV.double().softmax(-1)).sum(-1)
    torch.testing.assert_close(-confidence.double().log(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", list(RULES))
def test_confidences_are_compared_with_float64(rule):
    """What torch proposes passes; a confidence or token that is off does not."""
    rows, size, mask_id = 16, 1000, 7
    logits = (3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(1))).bfloat16()
    how = sampling(rule, rows, "cpu")
    counters = torch.arange(rows)
    if how is None:
        token, value = sample_greedy(logits.float(), mask_id)
    else:
        token, value = sample_drawn(logits.float(), mask_id, how, counters, counters % 7)
    same, error = confidence_error(logits, mask_id, token, value, how, counters)
    assert same and error <= RULES[rule]
    same, error = confidence_error(logits, mask_id, token, value * 1.01, how, counters)
    assert same and error > 5e-3
    other = torch.where(token == 0, 1, 0)
    assert not confidence_error(logits, mask_id, other, value, how, counters)[0]
