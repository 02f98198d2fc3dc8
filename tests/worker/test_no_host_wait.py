# SPDX-License-Identifier: Apache-2.0
"""A step on CUDA makes the host wait for nothing, and does what a step on a CPU does.

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

from sampler_parts import Event, Head, composed_as_on_cuda, make_states  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402

from vllm_d2f.strategies import ACCEPT, ONE_BY_ONE  # noqa: E402
from vllm_d2f.worker.masked_bounds import MaskedBounds  # noqa: E402
from vllm_d2f.worker.sampler import D2FSampler  # noqa: E402

SLOTS, WIDTH, HIDDEN, VOCABULARY, MASK, LENGTH = 5, 24, 16, 60, 59, 200

RULES = {
    0: dict(temperature=0, logprobs=2, repetition_penalty=1.3),
    1: dict(temperature=0.8, top_k=9, presence_penalty=0.5, min_tokens=4),
    4: dict(temperature=0, logprobs=0, logit_bias={7: 1.5}),
}
"""What the requests in these slots ask for beside their temperature."""


def make_base(device, async_scheduling):
    def staged(*shape):
        return SimpleNamespace(gpu=torch.zeros(shape, dtype=torch.int32, device=device))

    states = SimpleNamespace(
        draft_tokens=torch.zeros(
            SLOTS, WIDTH * (1 + async_scheduling), dtype=torch.int64, device=device
        ),
        all_token_ids=staged(SLOTS, LENGTH),
        total_len=staged(SLOTS),
    )
    return SimpleNamespace(req_states=states, penalties_state=None, sampling_states=None)


class Run:
    """One sampler with states of its own, fed as vLLM's runner feeds it."""

    def __init__(
        self, cuda, device, async_scheduling, shift, drawing, rules=(), origin="prompt_end"
    ):
        generator = torch.Generator().manual_seed(7)
        head = Head((3 * torch.randn(HIDDEN, VOCABULARY, generator=generator)).to(device))
        self.states = make_states(
            device,
            slots=SLOTS,
            width=WIDTH,
            hidden=HIDDEN,
            vocabulary=VOCABULARY,
            mask=MASK,
            length=LENGTH,
            shift=shift,
            ahead=async_scheduling,
            origin=origin,
        )
        self.drawing, self.rules = drawing, dict(rules)
        self.sampler = D2FSampler(self.states, head, make_base(device, async_scheduling), cuda=cuda)

    def admit(self, slot, params, max_tokens, prompt_len):
        asked = self.rules.get(slot, dict(temperature=0.7 if slot in self.drawing else 0))
        asked = asked | dict(min_tokens=min(asked.get("min_tokens", 0), max_tokens))
        sampling = SamplingParams(
            **asked, max_tokens=max_tokens, seed=slot, stop_token_ids=[3, 4], extra_args=params
        )
        data = SimpleNamespace(
            req_id=str(slot),
            sampling_params=sampling,
            prompt_token_ids=[5, 6, 7, 8, 9, 10, 11, 12][:prompt_len],
            prompt_len=prompt_len,
        )
        self.states.finish(str(slot))
        self.states.add(slot, data)
        self.sampler.add_request(slot, None)
        self.states.apply_staged_writes()
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


def play(device, async_scheduling, shift, drawing, guard, rules=(), origin="prompt_end", steps=40):
    """Random requests through both compositions; the calls of CUDA's are made under `guard`."""
    rng = np.random.default_rng(3)
    setting = (device, async_scheduling, shift, drawing, rules, origin)
    plain, cuda = (Run(cuda, *setting) for cuda in (False, True))
    generator = torch.Generator().manual_seed(1)
    free, fresh, rows = set(range(SLOTS)), set(), 0
    for _ in range(steps):
        for slot in list(free):
            if rng.random() < 0.6:
                size = int(rng.choice([2, 4, 8]))
                # What is decoded from left to right has a rule for one position.
                accept = str(rng.choice(ONE_BY_ONE if slot in rules else list(ACCEPT)))
                params = dict(
                    d2f_block_size=size,
                    d2f_max_blocks=WIDTH // size,
                    d2f_tau_add=0.1,
                    d2f_tau_act=0.5,
                    d2f_tau_conf=float(rng.choice([0.3, 0.9])),
                    d2f_accept=accept,
                )
                request = (slot, params, int(rng.integers(1, 60)), int(rng.integers(1, 9)))
                plain.admit(*request)
                with guard():
                    cuda.admit(*request)
                free.discard(slot)
                fresh.add(slot)
        busy = sorted(set(range(SLOTS)) - free)
        if not busy:
            continue
        window = plain.states.window
        open_S = window.open_R.tolist()
        lag_S = plain.sampler.lag_S.tolist()
        # Behind the window some positions that the scheduler adds in case.
        spare = int(rng.integers(0, 4)) if async_scheduling else 0
        # What is left of the prompt's tail in the query, which is no draft.
        start_S = window.start_R.tolist()
        tails = [max(lag_S[s] - start_S[s], 0) for s in busy]
        assert any(tails) <= (origin == "zero")
        widths = [lag_S[s] + open_S[s] + spare - t for s, t in zip(busy, tails, strict=True)]
        drafts = plain.sampler.req_states.draft_tokens
        for s, tail, width in zip(busy, tails, widths, strict=True):
            if not async_scheduling:
                assert torch.equal(drafts[s, :width], window.tokens_RW[s, tail : open_S[s]])
                assert (drafts[s, width:] == -1).all()
        prompts = [
            int(plain.states.prompt_len_S[s]) if s in fresh else t
            for s, t in zip(busy, tails, strict=True)
        ]
        lengths = [w + p for w, p in zip(widths, prompts, strict=True)]
        fresh.clear()
        batch = make_batch(busy, lengths, widths, device)
        hidden = torch.randn(sum(lengths), HIDDEN, generator=generator).to(device)
        want = plain.step(batch, hidden)
        with guard():
            got = cuda.step(batch, hidden)
        for name in ("num_sampled", "num_rejected", "num_nans"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        if not async_scheduling:  # the next query begins where the window does
            moved = plain.states.window.start_R[busy].cpu() - torch.tensor(start_S)[busy]
            here = torch.tensor(tails) + torch.tensor(widths)
            assert torch.equal(here - want.num_rejected.cpu(), moved.cpu())
        for row, count in enumerate(want.num_sampled.tolist()):
            assert torch.equal(
                got.sampled_token_ids[row, :count], want.sampled_token_ids[row, :count]
            )
            rows += count
        check_logprobs(want, got, busy, rules)
        for name in ("tokens_RW", "decoded_RW", "counters"):
            theirs, ours = getattr(plain.states.window, name), getattr(cuda.states.window, name)
            assert torch.equal(theirs, ours), name
        drafts = [run.sampler.req_states.draft_tokens for run in (plain, cuda)]
        assert torch.equal(*drafts)
        masked = window.masked_RW
        bound = cuda.sampler.proposals.bounds.bound(busy, np.full(len(busy), WIDTH))
        exact = masked.sum(1).cpu().numpy()[busy]
        assert (bound >= exact).all() and (async_scheduling or (bound == exact).all())
        # With asynchronous scheduling the engine learns one step late that a request is done.
        done = (window.open_R == 0) if async_scheduling else (window.lead_R >= window.goal_R)
        free |= {slot for slot in busy if done[slot]} if async_scheduling else set()
        if not async_scheduling:
            ended = [s for s, d in zip(busy, finished(want, plain, busy), strict=True) if d]
            free |= set(ended)
    assert rows > 100


def check_logprobs(want, got, busy, rules):
    """Log-probabilities belong to the emitted tokens."""
    asked = [slot in rules and rules[slot].get("logprobs") is not None for slot in busy]
    assert (want.logprobs_tensors is not None) == (got.logprobs_tensors is not None) == any(asked)
    if not any(asked):
        return
    left, right = (x.logprobs_tensors.to_cpu_nonblocking().tolists() for x in (want, got))
    for row, slot in enumerate(busy):
        count = int(want.num_sampled[row]) if asked[row] else 0
        one, other = (lists.slice_request(row, count) for lists in (left, right))
        if not count:
            continue
        columns = rules[slot]["logprobs"] + 1
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
    """Return whether nothing is left to decide for each request."""
    window = run.states.window
    return [
        bool(window.open_R[s] == 0)
        or bool(window.lead_R[s] >= window.goal_R[s])
        or bool(set(output.sampled_token_ids[i, : output.num_sampled[i]].tolist()) & {3, 4})
        for i, s in enumerate(busy)
    ]


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("drawing", [(), (1, 4)])
@pytest.mark.parametrize("rules", [{}, RULES], ids=["", "rules"])
def test_a_step_waits_for_nothing(monkeypatch, async_scheduling, shift, drawing, rules):
    composed_as_on_cuda(monkeypatch)
    allowed = ("vllm_d2f.worker.masked_bounds",)
    play("cpu", async_scheduling, shift, drawing, lambda: no_host_waits(allowed), rules)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("rules", [{}, RULES], ids=["", "rules"])
def test_with_a_tail_of_the_prompt_in_the_window(monkeypatch, async_scheduling, rules):
    composed_as_on_cuda(monkeypatch)
    allowed = ("vllm_d2f.worker.masked_bounds",)
    play(
        "cpu", async_scheduling, True, (1, 4), lambda: no_host_waits(allowed), rules, origin="zero"
    )


@pytest.mark.parametrize("drafts", [False, True])
def test_a_prompt_is_computed_again_from_its_last_block(drafts):
    """Blocks are counted from position 0: what of the prompt shares one with the answer is open."""
    run = Run(False, "cpu", False, True, (), origin="zero")
    run.admit(2, dict(d2f_block_size=4, d2f_max_blocks=2), 20, 6)
    assert run.sampler.req_states.draft_tokens[2].tolist() == [MASK, MASK] + [-1] * (WIDTH - 2)
    window = run.states.window
    assert window.tokens_RW[2, :4].tolist() == [9, 10, MASK, MASK]
    batch = make_batch([2], [8 if drafts else 6], [2 if drafts else 0], "cpu")
    batch.num_computed_tokens_np, batch.prefill_len_np = np.array([0]), np.array([6])
    output = run.step(batch, torch.randn(8 if drafts else 6, HIDDEN))
    # The query is as long as the prompt and the drafts; the next one begins at position 4.
    assert output.num_rejected.tolist() == [4 if drafts else 2]
    batch.num_computed_tokens_np, batch.prefill_len_np = np.array([0]), np.array([9])
    if not drafts:  # a chunk that ends earlier stays
        assert run.step(batch, torch.randn(6, HIDDEN)).num_rejected.tolist() == [0]


@pytest.mark.parametrize("cuda", [False, True])
def test_a_step_asks_once_which_requests_have_a_sampler_of_their_own(monkeypatch, cuda):
    class Samplers(dict):
        asked = 0

        def __contains__(self, slot):
            self.asked += 1
            return super().__contains__(slot)

        def get(self, slot, default=None):
            self.asked += 1
            return super().get(slot, default)

    composed_as_on_cuda(monkeypatch)
    run = Run(cuda, "cpu", False, False, (), RULES)
    for slot in range(3):
        run.admit(slot, dict(d2f_block_size=4, d2f_max_blocks=2), 8, 3)
    samplers = run.states.samplers = Samplers(run.states.samplers)
    run.step(make_batch([0, 1, 2], [7] * 3, [4] * 3, "cpu"), torch.randn(21, HIDDEN))
    assert set(samplers) == {0, 1} and samplers.asked == 3


def test_the_plain_sampler_would_be_caught(monkeypatch):
    """The check finds what it is for."""
    run = Run(False, "cpu", False, False, ())
    run.admit(0, dict(d2f_block_size=4, d2f_max_blocks=2), 8, 3)
    batch = make_batch([0], [4], [4], "cpu")
    with pytest.raises(HostWait, match="nonzero"), no_host_waits():
        run.step(batch, torch.randn(4, HIDDEN))


def test_bounds_of_masked_positions():
    bounds = MaskedBounds(3, in_flight=1, event=Event)
    bounds.start(2, known=8, block_size=8)
    assert bounds.bound([2], np.array([32])).tolist() == [8]
    bounds.record([2], torch.tensor([13]))
    assert bounds.bound([2], np.array([32])).tolist() == [16]  # one forward in flight
    bounds.record([2], torch.tensor([5]))
    assert bounds.bound([2], np.array([32])).tolist() == [21]
    bounds.start(2, known=4, block_size=4)  # another request: what is in flight is not its own
    bounds.record([0], torch.tensor([9]))
    assert bounds.bound([2, 0], np.array([3, 32])).tolist() == [3, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("drawing", [(), (1, 4)])
@pytest.mark.parametrize("rules", [{}, RULES], ids=["", "rules"])
def test_a_step_waits_for_nothing_on_a_device(async_scheduling, drawing, rules):
    from contextlib import contextmanager

    @contextmanager
    def guard():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    play("cuda", async_scheduling, True, drawing, guard, rules)
