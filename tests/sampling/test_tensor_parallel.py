# SPDX-License-Identifier: Apache-2.0
"""A vocabulary split over ranks gives what the whole one gives."""

import pytest
import torch
from host_waits import no_host_waits
from rank_threads import run_ranks

from vllm_d2f.sampling.sample import Sampling, sample
from vllm_d2f.sampling.tensor_parallel import all_gather_values, sample_sharded, shard

MASK, VOCABULARY, ROWS = 37, 101, 24


def make_logits(seed=0):
    logits = 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[:, MASK] = 50.0  # never proposed, however likely
    logits[3, 10] = logits[3, 90] = 30.0  # equal logits in two shards: the lower id wins
    logits[4, 60:] = -torch.inf
    logits[5, :60] = -torch.inf
    return logits


def make_sampling():
    sampling = Sampling.greedy(ROWS)
    sampling.temperature_R[::2] = 0.8
    sampling.temperature_R[::6] = 1.7
    sampling.min_p_R[::4] = 0.05
    sampling.seed_R += 5 + torch.arange(ROWS)
    position, forward = torch.arange(ROWS) * 3, torch.arange(ROWS) % 5
    return sampling, position, forward


def whole(logits, *settings, **more):
    return sample(logits.clone(), MASK, *settings, **more)


def over_ranks(logits, bounds, *settings, **more):
    """`sample_sharded` on each part of the columns."""
    volume = []

    def work(rank, gather):
        def counted(bits):
            volume.append(bits.numel())
            return gather(bits)

        part = logits[:, bounds[rank] : bounds[rank + 1]].clone()
        return sample_sharded(shard, part, MASK, bounds[rank], counted, *settings, **more)

    return run_ranks(len(bounds) - 1, work), sum(volume)


@pytest.mark.parametrize("bounds", [(0, 101), (0, 50, 101), (0, 37, 38, 101), (0, 30, 60, 90, 101)])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_split_is_whole(bounds, drawn, entropy):
    logits = make_logits()
    settings = make_sampling() if drawn else ()
    entropy_N = torch.arange(ROWS) % 3 > 0 if entropy else None
    want = whole(logits, *settings, entropy_N=entropy_N)
    results, volume = over_ranks(logits, bounds, *settings, entropy_N=entropy_N)
    for token, confidence in results:
        assert torch.equal(token, want[0])
        torch.testing.assert_close(confidence, want[1], rtol=2e-5, atol=1e-7)
    assert torch.equal(results[0][1], results[-1][1]), "ranks must agree to the bit"
    # What moves does not depend on the vocabulary: 4 numbers of a row and rank, one of them wide.
    assert volume == (len(bounds) - 1) * ROWS * (5 + drawn + entropy)


@pytest.mark.parametrize("bounds", [(0, 50, 101), (0, 37, 38, 101)])
def test_top_k_and_top_p_are_not_looked_at(bounds):
    """Rows with these gather their logits: tests/worker/test_proposals.py."""
    logits, (sampling, position, forward) = make_logits(), make_sampling()
    want = whole(logits, sampling, position, forward)
    sampling.top_k_R[:], sampling.top_p_R[:] = 3, 0.2
    (token, _), *_ = over_ranks(logits, bounds, sampling, position, forward)[0]
    assert torch.equal(token, want[0])


def test_one_exchange_is_exact():
    values = (
        torch.tensor([1.5, -0.0]),
        torch.tensor([1 << 40, -3]),
        torch.tensor([torch.nan, 2.0]),
    )
    back = all_gather_values(values, lambda bits: torch.stack((bits, bits)))
    for value, both in zip(values, back, strict=True):
        assert both.dtype == value.dtype
        for one in both:
            assert torch.equal(one.nan_to_num(7), value.nan_to_num(7))
    table = torch.rand(2, 5, dtype=torch.float64)
    back = all_gather_values((table, values[1]), lambda bits: torch.stack((bits, bits, bits)))
    assert torch.equal(back[0], table.expand(3, 2, 5)) and back[1].shape == (3, 2)


def test_nothing_waits_for_the_device():
    logits, settings = make_logits(), make_sampling()
    with no_host_waits():
        entropy_N = torch.ones(ROWS, dtype=torch.bool)
        alone = lambda bits: bits[None]  # noqa: E731
        sample_sharded(shard, logits, MASK, 0, alone, *settings, entropy_N=entropy_N)


def test_drawing_without_counters_is_refused():
    with pytest.raises(ValueError, match="position_N"):
        shard(make_logits(), MASK, make_sampling()[0])


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("entropy", [None, torch.ones(ROWS, dtype=torch.bool)], ids=["", "entropy"])
def test_a_nan_gets_no_confidence(drawn, entropy):
    logits, settings = make_logits(), make_sampling() if drawn else ()
    logits[0, 70] = torch.nan
    logits[8, 7] = torch.inf
    logits[12] = -torch.inf
    logits[3, 80] = torch.nan  # a row that is not drawn
    (token, confidence), *_ = over_ranks(logits, (0, 50, 101), *settings, entropy_N=entropy)[0]
    want_token, want = whole(logits, *settings, entropy_N=entropy)
    bad = torch.tensor([0, 3, 8, 12])
    assert torch.equal(token, want_token)
    torch.testing.assert_close(confidence, want, rtol=2e-5, atol=1e-7)
    assert not confidence[bad].any() and token[3] == 80
    confidence[bad] = 1
    assert (confidence > 0).all()


def gloo_rank(rank, file, queue):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)

    def gather(values):
        parts = [torch.empty_like(values) for _ in range(2)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    part = make_logits()[:, 50 * rank : 50 + 51 * rank].clone()
    token, confidence = sample_sharded(shard, part, MASK, 50 * rank, gather, *make_sampling())
    queue.put((rank, token.tolist(), confidence.tolist()))
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=gloo_rank, args=(rank, tmp_path / "store", queue))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    got = sorted(queue.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join(60)
    token, confidence = whole(make_logits(), *make_sampling())
    for _, tokens, confidences in got:
        assert tokens == token.tolist()
        assert confidences == pytest.approx(confidence.tolist(), rel=2e-5)
    assert got[0][1:] == got[1][1:]
