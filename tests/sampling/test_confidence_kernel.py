# SPDX-License-Identifier: Apache-2.0
"""The confidence kernel gives what `sampling.sample` gives.

On CUDA as it is; on a CPU under Triton's interpreter, which `test_kernel_interpreted.py` starts.
"""

import os

import pytest
import torch
from rank_threads import run_ranks

from vllm_d2f.sampling import tensor_parallel
from vllm_d2f.sampling.sample import Sampling, sample_drawn, sample_greedy

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="runs in test_kernel_interpreted.py",
    ),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

if INTERPRETED or torch.cuda.is_available():
    from vllm_d2f.sampling import confidence_kernel as confidence

SIZES = (5, 448, 8193, 126464, 152064)
MASK = 3


def random_logits(rows, size, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed + size)
    return (torch.randn(rows, size, generator=generator) * scale).to(DEVICE, dtype)


def random_sampling(rows, seed=0):
    """Return every rule alone and together; the first row is greedy."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values, dtype):
        index = torch.randint(len(values), (rows,), generator=generator)
        return torch.tensor(values, dtype=dtype)[index].to(DEVICE)

    out = Sampling(
        temperature_R=pick([0.0, 0.3, 0.7, 1.0, 1.7], torch.float32),
        top_k_R=pick([0, 1, 4, 50, 10**6], torch.int64),
        top_p_R=pick([1.0, 0.95, 0.5, 0.01], torch.float32),
        min_p_R=pick([0.0, 0.0, 0.05, 0.4], torch.float32),
        seed_R=torch.randint(1 << 62, (rows,), generator=generator).to(DEVICE),
    )
    out.temperature_R[0] = 0
    return out


def counters(rows):
    index = torch.arange(rows, device=DEVICE)
    return index * 7 % 31, index % 5


def expected(logits, sampling, position, forward, entropy=None):
    """`sampling.sample`, greedy and drawn rows apart, from float32."""
    token, value = sample_greedy(logits.float().clone(), MASK, entropy)
    drawn = (sampling.temperature_R > 0).nonzero()[:, 0]
    rows = (sampling.rows(drawn), position[drawn], forward[drawn])
    also = None if entropy is None else entropy[drawn]
    token[drawn], value[drawn] = sample_drawn(logits[drawn], MASK, *rows, also)
    return token, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_greedy(size, dtype):
    logits = random_logits(5, size, dtype)
    logits[:, MASK] += 100
    before = logits.clone()
    token, value = confidence.sample(logits, MASK)
    want_token, want = sample_greedy(logits.float().clone(), MASK)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want, rtol=2e-6, atol=1e-7)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize(("size", "rows"), [(5, 24), (448, 12), (8193, 5), (152064, 2)])
def test_drawn(size, rows, dtype):
    logits = random_logits(rows, size, dtype)
    logits[:, MASK] += 100
    rule, (position, forward) = random_sampling(rows, size), counters(rows)
    token, value = confidence.sample(logits, MASK, rule, position, forward)
    want_token, want = expected(logits, rule, position, forward)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want, rtol=2e-5, atol=1e-7)
    assert MASK not in token.tolist()


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("size", "rows"), [(5, 24), (448, 12), (8193, 5), (152064, 2)])
def test_entropy_of_what_may_be_drawn(size, rows, drawn):
    """Some rows ask for it; the others get their token's probability as before."""
    logits = random_logits(rows, size)
    logits[:, MASK] += 100
    logits[0, size // 2 :] = -torch.inf
    rule, (position, forward) = random_sampling(rows, size), counters(rows)
    entropy = torch.arange(rows, device=DEVICE) % 3 != 2
    settings = (rule, position, forward) if drawn else ()
    token, value = confidence.sample(logits, MASK, *settings, entropy_N=entropy)
    if not drawn:
        rule.temperature_R[:] = 0
    want_token, want = expected(logits, rule, position, forward, entropy)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want, rtol=5e-5, atol=1e-7)
    _, plain = confidence.sample(logits, MASK, *settings)
    assert torch.equal(value[~entropy], plain[~entropy])


def test_without_limits_every_token_can_be_drawn():
    rows = 80
    rule = Sampling.greedy(rows, DEVICE)
    rule.temperature_R[:] = 1
    rule.seed_R[:] = torch.arange(rows, device=DEVICE)
    logits = torch.zeros(rows, 9, device=DEVICE)
    zero = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    token, value = confidence.sample(logits, MASK, rule, zero, zero)
    assert set(token.tolist()) == set(range(9)) - {MASK}
    torch.testing.assert_close(value, torch.full_like(value, 1 / 8))
    assert torch.equal(token, expected(logits, rule, zero, zero)[0])


@pytest.mark.parametrize("k", [1, 3, 4, 7, 9])
def test_ties_at_the_limit_keep_the_lower_ids(k):
    rows = 12
    rule = Sampling.greedy(rows, DEVICE)
    rule.temperature_R[:] = 5
    rule.top_k_R[:] = k
    rule.seed_R[:] = torch.arange(rows, device=DEVICE)
    row = torch.tensor([1.0, 2, 2, 9, -0.0, 2, 1, 0.0, 2, -1])  # 9 is the mask's
    logits = row.to(DEVICE).repeat(rows, 1)
    zero = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    token, value = confidence.sample(logits, MASK, rule, zero, zero)
    want_token, want = expected(logits, rule, zero, zero)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want)
    order = [1, 2, 5, 8, 0, 6, 4, 7, 9]
    assert set(token.tolist()) <= set(order[:k])
    rule.top_k_R[:] = 0
    rule.top_p_R[:] = 0.05 * k
    token, value = confidence.sample(logits, MASK, rule, zero, zero)
    want_token, want = expected(logits, rule, zero, zero)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want)


def kept(row, temperature, k, p):
    """Return the probability of each id that stays, computed in float64.

    The order is that of (logit over temperature, then lower id). `sampling.sample` sorts by log p
    instead, whose rounding makes close logits equal.
    """
    row = row.cpu().float()
    row[MASK] = -torch.inf
    value, token = (row / temperature).sort(descending=True, stable=True)
    weight = (value.double() - value[0].double()).exp()
    weight[k or len(row) :] = 0
    weight[1:][(weight.cumsum(0) - weight >= p * weight.sum())[1:]] = 0
    token, weight = token[weight > 0], weight[weight > 0]
    return dict(zip(token.tolist(), (weight / weight.sum()).tolist(), strict=True))


def assert_kept(row, temperature, k, p, draws=1):
    """Compare tokens and probabilities, which tell how many tokens stay, with `kept`."""
    rule = Sampling.greedy(draws, DEVICE)
    rule.temperature_R[:], rule.top_k_R[:], rule.top_p_R[:] = temperature, k, p
    rule.seed_R[:] = torch.arange(draws, device=DEVICE)
    zero = torch.zeros_like(rule.seed_R)
    token, value = confidence.sample(row.repeat(draws, 1), MASK, rule, zero, zero)
    want = kept(row, temperature, k, p)
    assert set(token.tolist()) <= set(want), (k, p)
    probability = torch.tensor([want[t] for t in token.tolist()])
    torch.testing.assert_close(value.cpu(), probability, rtol=2e-5, atol=1e-7)


NEIGHBOURS = (0x3F9FFFFC + torch.arange(20) * 7 % 20).int().view(torch.float32)
ROWS = {
    "equal": torch.full((20,), -1.7),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 10),
    "neighbours": NEIGHBOURS,
    "neighbours below zero": -NEIGHBOURS,
    "around zero": (torch.arange(20) * 7 % 20 - 9) * 1e-45,
    "of all magnitudes": torch.cat([1e-30 * torch.ones(6), -torch.ones(7), -1e30 * torch.ones(7)]),
    "one finite": torch.where(torch.arange(20) == 11, 2.5, -torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_limits_in_a_row_of_close_logits(name, dtype):
    """Fewer bit patterns than pivots, neighbours, and different logits of one value."""
    row = ROWS[name].to(DEVICE, dtype)
    for temperature in (1.0, 3.0) if dtype == torch.float32 else (1.0,):
        for k, p in [(1, 1), (2, 1), (7, 1), (19, 1), (20, 1), (0, 1e-6), (0, 0.342), (0, 0.9999)]:
            assert_kept(row, temperature, k, p)
        assert_kept(row, temperature, 13, 0.654)
        assert_kept(row, temperature, 2, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_among_thousands_of_equals(dtype):
    row = (random_logits(1, 20000, scale=1.0)[0] * 2).round().to(dtype)
    for k, p in [(1, 1), (5000, 1), (19999, 1), (0, 0.4321), (0, 0.99), (5000, 0.8765)]:
        assert_kept(row, 0.8, k, p, draws=2)


def test_greedy_takes_the_first_of_equals():
    logits = random_logits(3, 20000)
    logits[0] = 1.5
    logits[1, [9, 17000, 19999]] = 50
    logits[2, :] = 0.0
    logits[2, :100] = -0.0
    token, value = confidence.sample(logits, MASK)
    assert token.tolist() == [0, 9, 0]
    torch.testing.assert_close(value.cpu(), torch.tensor([1 / 19999, 1 / 3, 1 / 19999]))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_rows_without_a_distribution(temperature, limited, entropy):
    """A NaN, +inf, nothing finite: confidence 0, and the token that `sampling.sample` takes."""
    logits = random_logits(7, 9000)
    logits[0, 8500] = torch.nan
    logits[1, [5, 8999]] = torch.nan
    logits[1, 4] = torch.inf
    logits[2, 700] = torch.inf
    logits[3] = -torch.inf
    logits[4] = -torch.inf
    logits[4, 8700] = -3.0  # the only one: certain
    logits[5, MASK] = torch.nan  # the mask token's logit does not count
    logits[6, 10:] = -torch.inf
    rule = Sampling.greedy(7, DEVICE)
    rule.temperature_R[:] = temperature
    if limited:
        rule.top_k_R[:], rule.top_p_R[:], rule.min_p_R[:] = 20, 0.9, 0.01
    position, forward = counters(7)
    entropy_N = torch.ones(7, dtype=torch.bool, device=DEVICE) if entropy else None
    token, value = confidence.sample(logits, MASK, rule, position, forward, entropy_N=entropy_N)
    want_token, want = expected(logits, rule, position, forward, entropy_N)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-7)
    assert value[:4].tolist() == [0, 0, 0, 0]
    assert value[4] == 1 and (value[5:] > 0).all()
    if temperature == 0:
        assert token[:4].tolist() == [8500, 5, 700, 0]


def test_result_does_not_depend_on_the_batch():
    logits = random_logits(12, 9000)
    rule, (position, forward) = random_sampling(12), counters(12)
    token, value = confidence.sample(logits, MASK, rule, position, forward)
    for some in ([7], [11, 0, 5], list(range(0, 12, 3))):
        index = torch.tensor(some, device=DEVICE)
        part = confidence.sample(
            logits[index], MASK, rule.rows(index), position[index], forward[index]
        )
        assert torch.equal(part[0], token[index])
        assert torch.equal(part[1], value[index])


def test_rows_of_a_wider_tensor_and_none():
    wide = random_logits(6, 1000)
    for logits in (wide[:, :600], wide[::2], wide.t().contiguous().t()):
        token, value = confidence.sample(logits, MASK)
        want_token, want = sample_greedy(logits.clone(), MASK)
        assert torch.equal(token, want_token)
        torch.testing.assert_close(value, want, rtol=2e-6, atol=1e-7)
    token, value = confidence.sample(wide[:0], MASK)
    assert token.shape == value.shape == (0,)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_shards_of_the_vocabulary(ranks, flip):
    """Partials of tensor-parallel ranks, in any order, are the whole row; and the torch shard's."""
    rows, size = 8, 20000
    logits = random_logits(rows, size)
    logits[0, [300, 19000]] = 60  # equal on two ranks: the lower id
    logits[1, 19500] = torch.nan
    cuts = [size * rank // ranks for rank in range(ranks + 1)]
    rule, (position, forward) = random_sampling(rows), counters(rows)
    rule.top_k_R[:], rule.top_p_R[:] = 0, 1.0
    rule.temperature_R[2:] = 0.9

    def over_ranks(shard, *settings, **more):
        def work(rank, gather):
            part = logits[:, cuts[rank] : cuts[rank + 1]].clone()
            turned = lambda bits: gather(bits).flip(0) if flip else gather(bits)  # noqa: E731
            return tensor_parallel.sample_sharded(
                shard, part, MASK, cuts[rank], turned, *settings, **more
            )

        results = run_ranks(ranks, work)
        assert all(map(torch.equal, results[0], results[-1]))
        return results[0]

    token, value = over_ranks(confidence.shard)
    want_token, want = sample_greedy(logits.clone(), MASK)
    assert torch.equal(token, want_token) and token[0] == 300 and token[1] == 19500
    torch.testing.assert_close(value, want, rtol=2e-6, atol=1e-7)

    token, value = over_ranks(confidence.shard, rule, position, forward)
    want_token, want = expected(logits, rule, position, forward)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want, rtol=2e-5, atol=1e-7)
    plain_token, plain = over_ranks(tensor_parallel.shard, rule, position, forward)
    assert torch.equal(token, plain_token)
    torch.testing.assert_close(value, plain, rtol=2e-5, atol=1e-7)

    entropy = torch.arange(rows, device=DEVICE) % 3 > 0
    token, value = over_ranks(confidence.shard, rule, position, forward, entropy_N=entropy)
    want_token, want = expected(logits, rule, position, forward, entropy)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(value, want, rtol=5e-5, atol=1e-7)


def test_drawing_without_counters_is_refused():
    with pytest.raises(ValueError, match="position_N"):
        confidence.sample(random_logits(1, 9), MASK, Sampling.greedy(1, DEVICE))
