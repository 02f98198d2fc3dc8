# SPDX-License-Identifier: Apache-2.0
"""The CUDA sampler's step waits for nothing, and does what the plain sampler does.

Here it runs on CPU tensors with the kernel's definition in the kernel's place; marked `gpu`, on a
device.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_waits import HostWait, no_host_waits

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm.sampling_params import SamplingParams  # noqa: E402

from vllm_d2f.d2f import D2FParams, Window, add  # noqa: E402
from vllm_d2f.sampling.request_sampler import make_proposer  # noqa: E402
from vllm_d2f.sampling.sample import Sampling, propose_drawn, propose_greedy  # noqa: E402
from vllm_d2f.worker import cuda_sampler  # noqa: E402
from vllm_d2f.worker.cuda_sampler import CudaSampler  # noqa: E402
from vllm_d2f.worker.masked_bounds import UndecidedBounds  # noqa: E402
from vllm_d2f.worker.sampler import D2FSampler  # noqa: E402

SLOTS, WIDTH, HIDDEN, VOCABULARY, MASK, ENDS, LENGTH = 5, 24, 16, 60, 59, 2, 200

RULES = {
    0: SamplingParams(temperature=0, logprobs=2, repetition_penalty=1.3),
    1: SamplingParams(temperature=0.8, top_k=9, seed=5, presence_penalty=0.5, min_tokens=4),
    4: SamplingParams(temperature=0, logprobs=0, logit_bias={7: 1.5}, stop_token_ids=[3, 4]),
}
"""What the requests in these slots ask for beside their temperature."""


class Event:
    """A copy that is done when it is waited for."""

    def record(self):
        pass

    def synchronize(self):
        pass


def stand_in(logits, mask_id, sampling=None, position=None, forward=None):
    """`kernels.confidence.propose` from its definition, for all rows alike."""
    token, value = propose_greedy(logits.clone(), mask_id)
    if sampling is None:
        return token, value
    drawn = sampling.temperature_R > 0
    every = Sampling(**vars_of(sampling))
    every.temperature_R = torch.where(drawn, sampling.temperature_R, 1.0)
    other, chance = propose_drawn(logits, mask_id, every, position, forward)
    return torch.where(drawn, other, token), torch.where(drawn, chance, value)


def vars_of(sampling):
    return {name: getattr(sampling, name) for name in type(sampling).__dataclass_fields__}


def make_state(device, lagging, shift, drawing):
    generator = torch.Generator().manual_seed(7)
    head = (3 * torch.randn(HIDDEN, VOCABULARY, generator=generator)).to(device)
    sampling = Sampling.greedy(SLOTS, device)
    sampling.seed_R += torch.arange(SLOTS, device=device)
    for slot in drawing:
        sampling.temperature_R[slot] = 0.7
    return SimpleNamespace(
        device=torch.device(device),
        lagging=lagging,
        shift=shift,
        mask_id=MASK,
        max_num_reqs=SLOTS,
        drawing=set(drawing),
        proposers={},
        cutting=set(),
        sharded=False,
        traced=set(),
        resumed=set(),
        sampling=sampling,
        settings=SimpleNamespace(simulate_tokens_per_forward=None, window=WIDTH),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY),
        project=lambda hidden: hidden @ head,
        last_hidden_SH=torch.zeros(SLOTS, HIDDEN, device=device),
        window=Window.empty(SLOTS, WIDTH, ENDS, MASK, device),
        prompt_len_S=np.zeros(SLOTS, dtype=np.int64),
        block_size_S=np.ones(SLOTS, dtype=np.int64),
    )


def make_base(device, lagging):
    def staged(*shape):
        return SimpleNamespace(gpu=torch.zeros(shape, dtype=torch.int32, device=device))

    states = SimpleNamespace(
        draft_tokens=torch.zeros(SLOTS, WIDTH * (1 + lagging), dtype=torch.int64, device=device),
        all_token_ids=staged(SLOTS, LENGTH),
        total_len=staged(SLOTS),
        vocab_size=VOCABULARY,
    )
    return SimpleNamespace(req_states=states, penalties_state=None, sampling_states=None)


class Run:
    """One sampler with a state of its own, fed as vLLM's runner feeds it."""

    def __init__(self, kind, device, lagging, shift, drawing, rules=()):
        self.state = make_state(device, lagging, shift, drawing)
        self.rules = dict(rules)
        self.sampler = kind(self.state, make_base(device, lagging))

    def admit(self, slot, params, max_tokens, prompt_len):
        state = self.state
        state.block_size_S[slot], state.prompt_len_S[slot] = params.block_size, prompt_len
        state.window.start(
            slot, params, max_tokens=max_tokens, limit=100, ends=[3, 4], mask_id=MASK
        )
        row = torch.full((1,), slot, dtype=torch.int64, device=state.device)
        rows = state.window.rows(row)
        add(rows)
        state.window.put(row, rows)
        if slot in self.rules:
            asked = self.rules[slot]
            state.sampling.temperature_R[slot] = asked.temperature
            state.sampling.top_k_R[slot] = asked.top_k
            state.drawing.discard(slot)
            state.proposers[slot] = make_proposer(
                asked,
                prompt=[5, 6, 7],
                sampling=state.sampling.rows(row),
                ends=[3, 4],
                tau_conf=params.tau_conf,
                mask_id=MASK,
                vocab_size=VOCABULARY,
                window=WIDTH,
                device=state.device,
            )
        self.sampler.add_request(slot, None)
        self.sampler.apply_staged_writes()

    def step(self, batch, hidden_TH):
        return self.sampler(hidden_TH, batch)


def make_batch(slots, lengths, widths, device):
    start = np.zeros(len(slots) + 1, dtype=np.int32)
    np.cumsum(lengths, out=start[1:])
    return SimpleNamespace(
        num_reqs=len(slots),
        num_draft_tokens_per_req=np.array(widths, dtype=np.int32),
        has_prefill=False,
        query_start_loc_np=start,
        idx_mapping=torch.tensor(slots, device=device),
        idx_mapping_np=np.array(slots),
    )


def play(device, lagging, shift, drawing, guard, rules=(), steps=40):
    """Random requests through both samplers; the CUDA sampler's calls are made under `guard`."""
    rng = np.random.default_rng(3)
    setting = (device, lagging, shift, drawing, rules)
    plain, cuda = (Run(kind, *setting) for kind in (D2FSampler, CudaSampler))
    generator = torch.Generator().manual_seed(1)
    free, fresh, rows = set(range(SLOTS)), set(), 0
    for _ in range(steps):
        for slot in list(free):
            if rng.random() < 0.6:
                size = int(rng.choice([2, 4, 8]))
                params = D2FParams(size, WIDTH // size, 0.1, 0.5, float(rng.choice([0.3, 0.9])))
                request = (slot, params, int(rng.integers(1, 60)), int(rng.integers(1, 9)))
                plain.admit(*request)
                with guard():
                    cuda.admit(*request)
                free.discard(slot)
                fresh.add(slot)
        busy = sorted(set(range(SLOTS)) - free)
        if not busy:
            continue
        window = plain.state.window
        open_S = window.open_R.tolist()
        lag_S = plain.sampler.lag_S.tolist()
        # Behind the window some positions that the scheduler adds in case.
        spare = int(rng.integers(0, 4)) if lagging else 0
        widths = [lag_S[s] + open_S[s] + spare for s in busy]
        prompts = [int(plain.state.prompt_len_S[s]) if s in fresh else 0 for s in busy]
        lengths = [w + p for w, p in zip(widths, prompts, strict=True)]
        fresh.clear()
        batch = make_batch(busy, lengths, widths, device)
        hidden = torch.randn(sum(lengths), HIDDEN, generator=generator).to(device)
        want = plain.step(batch, hidden)
        with guard():
            got = cuda.step(batch, hidden)
        for name in ("num_sampled", "num_rejected", "num_nans"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for row, count in enumerate(want.num_sampled.tolist()):
            assert torch.equal(
                got.sampled_token_ids[row, :count], want.sampled_token_ids[row, :count]
            )
            rows += count
        check_logprobs(want, got, busy, rules)
        for name in ("tokens_RW", "decoded_RW", "counters"):
            theirs, ours = getattr(plain.state.window, name), getattr(cuda.state.window, name)
            assert torch.equal(theirs, ours), name
        drafts = [run.sampler.req_states.draft_tokens for run in (plain, cuda)]
        assert torch.equal(*drafts)
        undecided = (window.column_W < window.open_R[:, None]) & ~window.decoded_RW
        bound = cuda.sampler.undecided.bound(busy, np.full(len(busy), WIDTH))
        exact = undecided.sum(1).cpu().numpy()[busy]
        assert (bound >= exact).all() and (lagging or (bound == exact).all())
        # A lagging engine learns one step late that a request is done.
        done = (window.open_R == 0) if lagging else (window.lead_R >= window.goal_R)
        free |= {slot for slot in busy if done[slot]} if lagging else set()
        if not lagging:
            ended = [s for s, d in zip(busy, finished(want, plain, busy), strict=True) if d]
            free |= set(ended)
    assert rows > 100


def check_logprobs(want, got, busy, rules):
    """Of the tokens that left, for whom they belong to."""
    asked = [slot in rules and rules[slot].logprobs is not None for slot in busy]
    assert (want.logprobs_tensors is not None) == (got.logprobs_tensors is not None) == any(asked)
    if not any(asked):
        return
    left, right = (x.logprobs_tensors.to_cpu_nonblocking().tolists() for x in (want, got))
    for row, slot in enumerate(busy):
        count = int(want.num_sampled[row]) if asked[row] else 0
        one, other = (lists.slice_request(row, count) for lists in (left, right))
        if not count:
            continue
        columns = rules[slot].logprobs + 1
        assert np.array_equal(
            one.logprob_token_ids[:, :columns], other.logprob_token_ids[:, :columns]
        )
        np.testing.assert_allclose(
            one.logprobs[:, :columns], other.logprobs[:, :columns], rtol=1e-4, atol=1e-4
        )
        tokens = want.sampled_token_ids[row, :count].tolist()
        assert one.logprob_token_ids[:, 0].tolist() == tokens
        assert np.array_equal(one.sampled_token_ranks, other.sampled_token_ranks)


def finished(output, run, busy):
    """Whether nothing is left to decide for each request."""
    window = run.state.window
    return [
        bool(window.open_R[s] == 0)
        or bool(window.lead_R[s] >= window.goal_R[s])
        or bool(set(output.sampled_token_ids[i, : output.num_sampled[i]].tolist()) & {3, 4})
        for i, s in enumerate(busy)
    ]


@pytest.mark.parametrize("lagging", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("drawing", [(), (1, 4)])
@pytest.mark.parametrize("rules", [{}, RULES], ids=["", "rules"])
def test_a_step_waits_for_nothing(monkeypatch, lagging, shift, drawing, rules):
    monkeypatch.setattr(cuda_sampler, "missing", lambda device: None)
    monkeypatch.setattr(cuda_sampler.confidence, "propose", stand_in)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    allowed = ("vllm_d2f.worker.masked_bounds",)
    play("cpu", lagging, shift, drawing, lambda: no_host_waits(allowed), rules)


def test_the_plain_sampler_would_be_caught(monkeypatch):
    """The check finds what it is for."""
    run = Run(D2FSampler, "cpu", False, False, ())
    run.admit(0, D2FParams(4, 2), 8, 3)
    batch = make_batch([0], [4], [4], "cpu")
    with pytest.raises(HostWait, match="nonzero"), no_host_waits():
        run.step(batch, torch.randn(4, HIDDEN))


def test_bounds_of_undecided_positions():
    bounds = UndecidedBounds(3, under_way=1, event=Event)
    bounds.start(2, known=8, block_size=8)
    assert bounds.bound([2], np.array([32])).tolist() == [8]
    bounds.note([2], torch.tensor([13]))
    assert bounds.bound([2], np.array([32])).tolist() == [16]  # one forward under way
    bounds.note([2], torch.tensor([5]))
    assert bounds.bound([2], np.array([32])).tolist() == [21]
    bounds.start(2, known=4, block_size=4)  # another request: what is under way is not its own
    bounds.note([0], torch.tensor([9]))
    assert bounds.bound([2, 0], np.array([3, 32])).tolist() == [3, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lagging", [False, True])
@pytest.mark.parametrize("drawing", [(), (1, 4)])
@pytest.mark.parametrize("rules", [{}, RULES], ids=["", "rules"])
def test_a_step_waits_for_nothing_on_a_device(lagging, drawing, rules):
    from contextlib import contextmanager

    @contextmanager
    def guard():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    play("cuda", lagging, True, drawing, guard, rules)
