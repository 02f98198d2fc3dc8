# SPDX-License-Identifier: Apache-2.0
"""A vocabulary split over ranks proposes what the whole one does."""

import math
import threading

import pytest
import torch
from host_waits import no_host_waits

from vllm_d2f.sampling.exchange import exchange
from vllm_d2f.sampling.sample import Sampling, propose_drawn, propose_greedy
from vllm_d2f.sampling.tensor_parallel import propose_sharded
from vllm_d2f.sampling.vocab_cut import cut

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


def whole(logits, sampling, position, forward):
    token, confidence = propose_greedy(logits.clone(), MASK)
    if sampling is not None:
        drawn = (sampling.temperature_R > 0).nonzero()[:, 0]
        token[drawn], confidence[drawn] = propose_drawn(
            logits[drawn], MASK, sampling.rows(drawn), position[drawn], forward[drawn]
        )
    return token, confidence


def cut_sampling():
    """Rows with top_k, with top_p, with both, with min_p beside them, and without."""
    sampling, position, forward = make_sampling()
    row = torch.arange(ROWS)
    sampling.temperature_R[row % 3 == 1] = 1.2
    sampling.top_k_R[row % 4 == 0] = 1 + row[row % 4 == 0]
    sampling.top_k_R[2] = 500  # more than there are
    sampling.top_p_R[row % 4 < 2] = 0.3 + 0.02 * row[row % 4 < 2]
    return sampling, position, forward


def shards(logits, bounds, sampling=None, position=None, forward=None, cut=False):
    """`propose_sharded` on each part of the columns, one thread per rank."""
    ranks = len(bounds) - 1
    board, results, volume = [None] * ranks, [None] * ranks, []
    barrier = threading.Barrier(ranks, timeout=60)

    def run(rank):
        def gather(values):
            barrier.wait()
            board[rank] = values
            volume.append(values.numel())
            barrier.wait()
            return torch.stack(board)

        part = logits[:, bounds[rank] : bounds[rank + 1]].clone()
        results[rank] = propose_sharded(
            part,
            MASK,
            bounds[rank],
            gather,
            sampling,
            position,
            forward,
            rank if cut else None,
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, sum(volume)


@pytest.mark.parametrize("bounds", [(0, 101), (0, 50, 101), (0, 37, 38, 101), (0, 30, 60, 90, 101)])
@pytest.mark.parametrize("drawn", [False, True])
def test_split_is_whole(bounds, drawn):
    logits = make_logits()
    settings = make_sampling() if drawn else (None, None, None)
    want = whole(logits, *settings)
    results, volume = shards(logits, bounds, *settings)
    for token, confidence in results:
        assert torch.equal(token, want[0])
        torch.testing.assert_close(confidence, want[1], rtol=2e-5, atol=1e-7)
    assert torch.equal(results[0][1], results[-1][1]), "ranks must agree to the bit"
    # What moves does not depend on the vocabulary: 5 numbers of a row and rank (a token has two).
    assert volume == (len(bounds) - 1) * ROWS * (6 + drawn)


@pytest.mark.parametrize("bounds", [(0, 101), (0, 50, 101), (0, 37, 38, 101), (0, 30, 60, 90, 101)])
@pytest.mark.parametrize("seed", range(8))
def test_cut_at_top_k_and_top_p(bounds, seed):
    logits = make_logits(seed)
    if seed % 2:
        logits = logits.round()  # many equal values, on all ranks
    settings = cut_sampling()
    settings[0].seed_R += seed
    want = whole(logits, *settings)
    uncut = whole(logits, *make_sampling())
    assert not torch.equal(want[0], uncut[0])
    results, volume = shards(logits, bounds, *settings, cut=True)
    for token, confidence in results:
        assert torch.equal(token, want[0])
        torch.testing.assert_close(confidence, want[1], rtol=2e-5, atol=1e-7)
    assert torch.equal(results[0][1], results[-1][1])
    # Of a row and rank: for each limit four digits of 256 float64 and two numbers more, once the
    # whole probability, and what moves without limits.
    assert volume == (len(bounds) - 1) * ROWS * (7 + 2 * (2 * (4 * 256 + 2) + 1))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_what_a_cut_keeps(ranks):
    """Against a sort in float64, with many equal values."""
    generator = torch.Generator().manual_seed(ranks)
    value = -torch.randint(0, 6, (40, 60), generator=generator).float() * math.log(2.0)
    top_k = torch.randint(0, 70, (40,), generator=generator)
    top_p = torch.where(
        torch.rand(40, generator=generator) < 0.3, 1.0, torch.rand(40, generator=generator)
    )
    order = value.sort(descending=True, stable=True).indices
    mass = value.double().exp().gather(1, order)
    rank = torch.arange(60)
    mass[(top_k[:, None] > 0) & (rank >= top_k[:, None])] = 0
    before = mass.cumsum(1) - mass
    keep = (mass > 0) & ((before < top_p[:, None] * mass.sum(1, keepdim=True)) | (rank == 0))
    want = torch.zeros_like(keep).scatter(1, order, keep)

    parts = value.split(60 // ranks, 1)
    board, got, barrier = [None] * ranks, [None] * ranks, threading.Barrier(ranks, timeout=60)

    def run(rank):
        def gather(values):
            barrier.wait()
            board[rank] = values
            barrier.wait()
            return torch.stack(board)

        got[rank] = cut(parts[rank], torch.zeros(40), top_k, top_p, rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat(got, 1), want)


def test_one_exchange_is_exact():
    values = (
        torch.tensor([1.5, -0.0]),
        torch.tensor([1 << 40, -3]),
        torch.tensor([torch.nan, 2.0]),
    )
    back = exchange(values, lambda bits: torch.stack((bits, bits)))
    for value, both in zip(values, back, strict=True):
        assert both.dtype == value.dtype
        for one in both:
            assert torch.equal(one.nan_to_num(7), value.nan_to_num(7))
    table = torch.rand(2, 5, dtype=torch.float64)
    back = exchange((table, values[1]), lambda bits: torch.stack((bits, bits, bits)))
    assert torch.equal(back[0], table.expand(3, 2, 5)) and back[1].shape == (3, 2)


def test_nothing_waits_for_the_device():
    logits, settings = make_logits(), cut_sampling()
    with no_host_waits():
        propose_sharded(logits, MASK, 0, lambda bits: bits[None], *settings, 0)


def test_a_nan_gets_no_confidence():
    logits = make_logits()
    logits[0, 70] = torch.nan
    logits[8, 7] = torch.inf
    logits[12] = -torch.inf
    for settings, is_cut in (((), False), (make_sampling(), False), (cut_sampling(), True)):
        (token, confidence), *_ = shards(logits, (0, 50, 101), *settings, cut=is_cut)[0]
        bad = torch.tensor([0, 8, 12])
        assert not confidence[bad].any() and ((token >= 0) & (token < VOCABULARY)).all()
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
    token, confidence = propose_sharded(part, MASK, 50 * rank, gather, *cut_sampling(), rank)
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
    token, confidence = whole(make_logits(), *cut_sampling())
    for _, tokens, confidences in got:
        assert tokens == token.tolist()
        assert confidences == pytest.approx(confidence.tolist(), rel=2e-5)
    assert got[0][1:] == got[1][1:]
