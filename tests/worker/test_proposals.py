# SPDX-License-Identifier: Apache-2.0
"""Proposals as they are composed on CUDA, and over tensor-parallel ranks, are the plain ones.

tests/sampling compares the kernel's results. Here its definition takes its place, so the code
around it runs without a device: padded rows, the way back to their positions, settings per row, and
which rows gather their logits.
"""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rank_threads import run_ranks

pytest.importorskip("vllm")
pytest.importorskip("triton")

from sampler_parts import Head, composed_as_on_cuda, make_states  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402

from vllm_d2f.d2f import D2FParams  # noqa: E402
from vllm_d2f.sampling import confidence_kernel, tensor_parallel  # noqa: E402
from vllm_d2f.sampling.request_sampler import make_request_sampler  # noqa: E402
from vllm_d2f.strategies import NUMBER  # noqa: E402
from vllm_d2f.worker import proposals  # noqa: E402
from vllm_d2f.worker.proposals import Proposals, Queries  # noqa: E402
from vllm_d2f.worker.sampler import D2FSampler  # noqa: E402

SLOTS, WIDTH, HIDDEN, VOCABULARY, MASK = 6, 24, 8, 50, 49


def states_of(generator, shift, drawing, ahead=False, entropy=()):
    states = make_states(
        "cpu",
        slots=SLOTS,
        width=WIDTH,
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        mask=MASK,
        shift=shift,
        ahead=ahead,
    )
    states.sampling.seed_R += torch.arange(SLOTS)
    for slot in drawing:
        states.sampling.temperature_R[slot] = 0.8
        states.drawing.add(slot)
    for slot in range(SLOTS):
        rule = "entropy" if slot in entropy else "threshold"
        states._set_rule(slot, rule)
        states.window.rule_R1[slot] = NUMBER[rule]
    states.last_hidden_SH.copy_(torch.randn(SLOTS, HIDDEN, generator=generator))
    states.window.start_R.copy_(torch.arange(SLOTS) * 8)
    states.window.forward_R.copy_(torch.arange(SLOTS) + 3)
    states.block_size_S[:] = 8
    return states


def make_head(generator):
    return torch.randn(HIDDEN, VOCABULARY, generator=generator)


def make_queries(states, hidden, slots, width, begin, first):
    samplers = {d: states.samplers[s] for d, s in enumerate(slots) if s in states.samplers}
    return Queries(
        hidden, slots, np.full(len(slots), width), torch.tensor(slots), begin, first, samplers
    )


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("drawing", [(), (1, 4)])
@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("entropy", [(), (0, 4)])
def test_padded_rows_give_the_same(monkeypatch, shift, drawing, spare, entropy):
    composed_as_on_cuda(monkeypatch)
    generator = torch.Generator().manual_seed(spare)
    states, head = states_of(generator, shift, drawing, entropy=entropy), Head(make_head(generator))
    plain, cuda = (Proposals(states, head, None, cuda=cuda) for cuda in (False, True))
    slots = [4, 0, 1, 5]
    masked = torch.rand(4, WIDTH, generator=generator) < 0.6
    masked[1] = False
    for slot, count in zip(slots, masked.sum(1).tolist(), strict=True):
        cuda.bounds.start(slot, count + spare, 8)
    first_D = torch.tensor([0, 24, 53, 77])  # before the third window a prompt of 5 rides along
    begin_D = torch.tensor([0, 24, 48, 77])
    hidden = torch.randn(101, HIDDEN, generator=generator)
    queries = make_queries(states, hidden, slots, WIDTH, begin_D, first_D)
    want, got = plain(masked, queries), cuda(masked, queries)
    assert torch.equal(got[0], want[0])
    # Another number of rows rounds the head's product differently.
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)
    assert (got[1][masked] > 0).all() and (got[1][~masked] == 0).all()


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("drawing", [False, True])
@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("entropy", [(), (1, 3, 5)])
def test_ranks_give_what_the_whole_vocabulary_gives(monkeypatch, cuda, drawing, chunk, entropy):
    """Greedy rows, drawn rows with min_p, rows with top_k and top_p, and a request sampler.

    Only the rows of the last two gather their logits. On CUDA the others go through the kernel.
    """
    calls = []

    def shard(logits, *args, **named):
        calls.append(len(logits))
        return tensor_parallel.shard(logits.clone(), *args, **named)

    composed_as_on_cuda(monkeypatch, shard)
    generator, own = torch.Generator().manual_seed(1), threading.local()
    monkeypatch.setattr(proposals, "gather_ranks", lambda bits: own.gather(bits))
    states = states_of(generator, True, (1, 2, 4) if drawing else (), entropy=entropy)
    if drawing:
        states.sampling.min_p_R[1] = 0.05
        states.sampling.top_k_R[4], states.sampling.top_p_R[2] = 5, 0.7
        states.truncating.update({2, 4})
    states.samplers[3] = make_request_sampler(
        SamplingParams(temperature=0, logit_bias={7: 3.0}),
        prompt=[1],
        sampling=states.sampling.rows(states.row(3)),
        ends=[],
        d2f=D2FParams(accept="entropy" if 3 in entropy else "threshold"),
        mask_id=MASK,
        vocab_size=VOCABULARY,
        window=WIDTH,
    )
    slots = [5, 4, 3, 1, 2, 0]
    masked = torch.rand(6, WIDTH, generator=generator) < 0.5
    at = torch.arange(6) * WIDTH
    hidden = torch.randn(6 * WIDTH, HIDDEN, generator=generator)
    queries = make_queries(states, hidden, slots, WIDTH, at, at)
    head = make_head(generator)
    want = Proposals(states, Head(head), None)(masked, queries)

    bounds = (0, 20, 41, VOCABULARY)
    heads = [Head(head, low, high) for low, high in zip(bounds, bounds[1:], strict=False)]

    def run(rank, gather):
        own.gather = gather
        sharded = Proposals(states, heads[rank], None, tensor_parallel_size=3, cuda=cuda)
        assert sharded.shard is (confidence_kernel.shard if cuda else tensor_parallel.shard)
        sharded.rows_per_chunk = chunk
        for slot, count in zip(slots, masked.sum(1).tolist(), strict=True):
            if cuda:
                sharded.bounds.start(slot, count, 8)
        return sharded(masked, queries)

    results = run_ranks(3, run)
    for token, confidence in results:
        assert torch.equal(token, want[0])
        torch.testing.assert_close(confidence, want[1], rtol=2e-5, atol=1e-7)
        assert torch.equal(confidence, results[0][1])
    whole = masked[[1, 2, 4] if drawing else [2]].sum()
    for one in heads:
        assert sum(one.whole) == whole
        assert 0 <= sum(one.sharded) - (masked.sum() - whole) < 16  # and padding
    assert bool(calls) == cuda


@pytest.fixture
def on_cpu(monkeypatch):
    composed_as_on_cuda(monkeypatch)


def test_bounds_of_requests_that_came_back_and_are_scheduled_ahead(on_cpu):
    """Nothing is known of their windows but the width, and a query may be wider than these."""
    generator = torch.Generator().manual_seed(3)
    states, head = states_of(generator, False, (), ahead=True), Head(make_head(generator))
    plain, cuda = (Proposals(states, head, None, cuda=cuda) for cuda in (False, True))
    slots = list(range(SLOTS))
    for slot in slots:
        cuda.bounds.start(slot, WIDTH, 8)
    cuda.bounds.record(slots, torch.full((SLOTS,), 5))  # in flight: not read yet
    masked = torch.ones(SLOTS, WIDTH, dtype=torch.bool)
    at = torch.arange(SLOTS) * 2 * WIDTH
    hidden = torch.randn(SLOTS * 2 * WIDTH, HIDDEN, generator=torch.Generator().manual_seed(4))
    queries = make_queries(states, hidden, slots, 2 * WIDTH, at, at)
    want, got = plain(masked, queries), cuda(masked, queries)
    assert torch.equal(got[0], want[0])


BASE = SimpleNamespace(
    req_states=SimpleNamespace(all_token_ids=SimpleNamespace(gpu=None)),
    penalties_state=None,
    sampling_states=None,
)


def test_the_profiling_run_takes_what_a_step_may(on_cpu):
    generator = torch.Generator().manual_seed(3)
    head = Head(make_head(generator))
    sampler = D2FSampler(states_of(generator, False, ()), head, BASE, cuda=True)
    sampler.proposals.rows_per_chunk = 40
    output = sampler(torch.randn(100, HIDDEN), SimpleNamespace(num_reqs=100))
    assert head.whole == [40] and not output.num_sampled.any()


def test_without_cuda_it_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    generator = torch.Generator()
    with pytest.raises(RuntimeError, match="CUDA device"):
        Proposals(states_of(generator, False, ()), Head(make_head(generator)), None, cuda=True)
