# SPDX-License-Identifier: Apache-2.0
"""The CUDA sampler's proposals are the plain sampler's.

The kernel's results are compared in tests/kernels; here `proposal` stands in for it, so that what
is around it runs without a device: the padded rows, their way back and the per-row settings.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm_d2f.sampling.sample import Sampling, propose_drawn, propose_greedy  # noqa: E402
from vllm_d2f.worker import cuda_sampler  # noqa: E402
from vllm_d2f.worker.cuda_sampler import CudaSampler  # noqa: E402
from vllm_d2f.worker.sampler import D2FSampler  # noqa: E402

Event = type("Event", (), {"record": lambda self: None, "synchronize": lambda self: None})
SLOTS, WIDTH, HIDDEN, VOCABULARY, MASK = 6, 24, 8, 50, 49


def stand_in(logits, mask_id, sampling=None, position=None, forward=None):
    """`kernels.confidence.propose` from its definition."""
    token, value = propose_greedy(logits.clone(), mask_id)
    if sampling is not None:
        drawn = (sampling.temperature_R > 0).nonzero()[:, 0]
        token[drawn], value[drawn] = propose_drawn(
            logits[drawn], mask_id, sampling.rows(drawn), position[drawn], forward[drawn]
        )
    return token, value


def make_state(generator, shift, drawing):
    sampling = Sampling.greedy(SLOTS)
    sampling.seed_R += torch.arange(SLOTS)
    for slot in drawing:
        sampling.temperature_R[slot] = 0.8
    head = torch.randn(HIDDEN, VOCABULARY, generator=generator)
    return SimpleNamespace(
        device=torch.device("cpu"),
        shift=shift,
        mask_id=MASK,
        drawing=set(drawing),
        lagging=False,
        max_num_reqs=SLOTS,
        resumed=set(),
        proposers={},
        cutting=set(),
        sharded=False,
        sampling=sampling,
        settings=SimpleNamespace(simulate_tokens_per_forward=None, window=WIDTH),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY),
        project=lambda hidden: hidden @ head,
        last_hidden_SH=torch.randn(SLOTS, HIDDEN, generator=generator),
        window=SimpleNamespace(
            start_R=torch.arange(SLOTS) * 8,
            forward_R=torch.arange(SLOTS) + 3,
        ),
    )


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("drawing", [(), (1, 4)])
@pytest.mark.parametrize("spare", [0, 7])
def test_proposals_equal(monkeypatch, shift, drawing, spare):
    monkeypatch.setattr(cuda_sampler, "missing", lambda device: None)
    monkeypatch.setattr(cuda_sampler.confidence, "propose", stand_in)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    generator = torch.Generator().manual_seed(spare)
    state = make_state(generator, shift, drawing)
    base = SimpleNamespace(req_states=None, penalties_state=None, sampling_states=None)
    plain, cuda = D2FSampler(state, base), CudaSampler(state, base)
    slot_D = torch.tensor([4, 0, 1, 5])
    masked = torch.rand(4, WIDTH, generator=generator) < 0.6
    masked[1] = False
    for sampler in (plain, cuda):
        sampler.slots, sampler.width_D = slot_D.tolist(), np.full(4, WIDTH)
    for slot, undecided in zip(slot_D.tolist(), masked.sum(1).tolist(), strict=True):
        cuda.undecided.start(slot, undecided + spare, 8)
    first_D = torch.tensor([0, 24, 53, 77])  # before the third window a prompt of 5 rides along
    begin_D = torch.tensor([0, 24, 48, 77])
    hidden = torch.randn(101, HIDDEN, generator=generator)
    want = plain._proposals(masked, hidden, slot_D, begin_D, first_D)
    got = cuda._proposals(masked, hidden, slot_D, begin_D, first_D)
    assert torch.equal(got[0], want[0])
    # Another number of rows rounds the head's product differently.
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)
    assert (got[1][masked] > 0).all() and (got[1][~masked] == 0).all()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(cuda_sampler, "missing", lambda device: None)
    monkeypatch.setattr(cuda_sampler.confidence, "propose", stand_in)
    monkeypatch.setattr(torch.cuda, "Event", Event)


def test_bounds_of_requests_that_came_back_and_are_scheduled_ahead(on_cpu):
    """Nothing is known of their windows but the width, and a query may be wider than these."""
    state = make_state(torch.Generator().manual_seed(3), False, ())
    state.lagging = True
    base = SimpleNamespace(req_states=None, penalties_state=None, sampling_states=None)
    plain, cuda = D2FSampler(state, base), CudaSampler(state, base)
    slots = list(range(SLOTS))
    for slot in slots:
        cuda.undecided.start(slot, WIDTH, 8)
    cuda.undecided.note(slots, torch.full((SLOTS,), 5))  # under way: not read yet
    for sampler in (plain, cuda):
        sampler.slots, sampler.width_D = slots, np.full(SLOTS, 2 * WIDTH)
    masked = torch.ones(SLOTS, WIDTH, dtype=torch.bool)
    at = torch.arange(SLOTS) * 2 * WIDTH
    hidden = torch.randn(SLOTS * 2 * WIDTH, HIDDEN, generator=torch.Generator().manual_seed(4))
    want = plain._proposals(masked, hidden, torch.tensor(slots), at, at)
    got = cuda._proposals(masked, hidden, torch.tensor(slots), at, at)
    assert torch.equal(got[0], want[0])


def test_the_profiling_run_takes_what_a_step_may(on_cpu):
    state = make_state(torch.Generator().manual_seed(3), False, ())
    base = SimpleNamespace(req_states=None, penalties_state=None, sampling_states=None)
    seen, project = [], state.project
    state.project = lambda hidden: seen.append(len(hidden)) or project(hidden)
    cuda = CudaSampler(state, base)
    cuda.rows_per_chunk = 40
    output = cuda(torch.randn(100, HIDDEN), SimpleNamespace(num_reqs=100))
    assert seen == [40] and not output.num_sampled.any()


def test_without_cuda_it_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    state = make_state(torch.Generator(), False, ())
    base = SimpleNamespace(req_states=None, penalties_state=None, sampling_states=None)
    with pytest.raises(RuntimeError, match="CUDA device"):
        CudaSampler(state, base)
