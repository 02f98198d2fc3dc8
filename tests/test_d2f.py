# SPDX-License-Identifier: Apache-2.0
"""The vectorised algorithm against a literal, one-request transcription of its description."""

import itertools
import math
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_d2f import strategies
from vllm_d2f.d2f import Beginning, D2FParams, Window, activated, add, block_of, may_attend, step
from vllm_d2f.sampling.sample import sample_greedy
from vllm_d2f.strategies import ACCEPT

MASK, VOCAB = 0, 6


@dataclass
class Plain:
    """One request, word by word: lists, loops and an `if` for every sentence."""

    params: D2FParams
    max_tokens: int
    limit: int
    ends: set[int]
    tail: list[int] = field(default_factory=list)  # tokens of the prompt in the first block
    committed: list[int] = field(default_factory=list)
    blocks: list[list[int | None]] = field(default_factory=list)
    activated: list[bool] = field(default_factory=list)
    done: bool = False

    def wanted(self) -> int:
        """Positions from the first block's begin to the end of the answer."""
        return len(self.tail) + min(self.max_tokens, self.limit)

    def length(self, index: int) -> int:
        """Positions of block `index`, the last of which may not fit, or be cut."""
        total = len(self.tail) + self.max_tokens
        if not self.params.cut_last_block:
            total = math.ceil(total / self.params.block_size) * self.params.block_size
        total = min(total, len(self.tail) + self.limit)
        return min(self.params.block_size, total - index * self.params.block_size)

    def fraction(self, block: list[int | None]) -> float:
        return sum(t is not None for t in block) / len(block)

    def ended(self) -> int | None:
        """Answer position of the first decided end token among those the request wants."""
        for position, token in enumerate(self.all_tokens()):
            if token in self.ends and len(self.tail) <= position < self.wanted():
                return position
        return None

    def all_tokens(self) -> list[int | None]:
        return [*self.committed, *(t for block in self.blocks for t in block)]

    def left(self) -> list[int]:
        """Return the emitted tokens: everything before the first masked position."""
        known = list(itertools.takewhile(lambda token: token is not None, self.all_tokens()))
        return known[len(self.tail) :]

    def add(self) -> None:
        first = len(self.committed) // self.params.block_size
        index = first + len(self.blocks)
        may_add = (
            self.ended() is None
            and self.length(index) > 0
            and len(self.blocks) < self.params.max_blocks
            and (not self.blocks or self.fraction(self.blocks[-1]) >= self.params.tau_add)
        )
        if may_add:
            begin = self.tail if index == 0 else []
            self.blocks.append([*begin, *[None] * (self.length(index) - len(begin))])
            self.activated.append(False)
        for i in range(len(self.blocks)):
            filled = 1.0 if i == 0 else self.fraction(self.blocks[i - 1])
            if filled >= self.params.tau_act:
                self.activated[i] = True

    def step(self, tokens: list[int], confidences: list[float]) -> None:
        self.accepted = [0, 0]  # in fully activated blocks, in others
        full_before = [all(t is not None for t in block) for block in self.blocks]
        at = 0
        for block, active in zip(self.blocks, self.activated, strict=True):
            here = range(at, at + len(block))
            at += len(block)
            masked = [p for p in here if block[p - here.start] is None]
            ranked = sorted(masked, key=lambda p: (-confidences[p], p))
            take = ranked[: passing(self.params, [confidences[p] for p in ranked])]
            if active and len(take) < self.params.min_per_step:
                left = ranked[len(take) :]
                if self.params.accept == "leftmost":
                    left.sort()
                take += left[: self.params.min_per_step - len(take)]
            for p in take:
                block[p - here.start] = tokens[p]
            self.accepted[not active] += len(take)
        position, opened = self.ended(), len(self.blocks)
        if position is not None:
            keep = position // self.params.block_size + 1
            first = len(self.committed) // self.params.block_size
            del self.blocks[keep - first :], self.activated[keep - first :]
        self.dropped = opened - len(self.blocks)
        wanted = self.wanted() if position is None else position + 1
        everything = self.all_tokens()
        self.done = len(everything) >= wanted and None not in everything[:wanted]
        if self.done:
            self.committed, self.blocks = everything[:wanted], []
            return
        while self.blocks and full_before[0]:
            self.committed += self.blocks.pop(0)
            self.activated.pop(0)
            full_before.pop(0)


def passing(params: D2FParams, ranked: list[float]) -> int:
    """Count the confidences that pass the rule; they are those of a block, highest first."""
    tau = Fraction(float(torch.tensor(params.tau, dtype=torch.float32)))
    count, lost = 0, Fraction(0)
    for n, confidence in enumerate(map(Fraction, ranked), 1):
        lost += 1 - confidence
        if params.accept == "frechet":
            passes = (1 - lost) - (1 - confidence) > tau
        elif params.accept == "factor":
            passes = (n + 1) * (1 - confidence) < 1 - tau
        else:
            passes = confidence > tau
        if passes:
            count = n
    return count


params_strategy = st.builds(
    D2FParams,
    block_size=st.integers(1, 7),
    max_blocks=st.integers(1, 4),
    tau_add=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    tau_act=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    tau_conf=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    min_per_step=st.sampled_from([1, 1, 2, 3, 99]),
    cut_last_block=st.sampled_from([0, 1]),
    accept=st.sampled_from(list(ACCEPT)),
)
request_strategy = st.tuples(
    params_strategy,
    st.integers(1, 25),  # max_tokens
    st.integers(1, 30),  # limit
    st.sets(st.integers(1, VOCAB - 1), max_size=2),  # ends
    st.lists(st.integers(0, VOCAB - 1), max_size=6),  # tail, cut to fit a block
)


@settings(max_examples=150, deadline=None)
@given(st.lists(request_strategy, min_size=1, max_size=5), st.integers(0, 2**31))
def test_equals_the_plain_transcription(requests, seed):
    generator = torch.Generator().manual_seed(seed)
    width = 28
    window = Window.empty(len(requests), width, 2, MASK)
    plain = []
    for row, (params, max_tokens, limit, ends, tail) in enumerate(requests):
        tail = tail[: params.block_size - 1]
        window.start([row], [Beginning(params, max_tokens, limit, sorted(ends), tail)], MASK)
        plain.append(Plain(params, max_tokens, limit, ends, tail))
    outputs: list[list[int]] = [[] for _ in requests]
    done = [False] * len(requests)
    for _ in range(2 * 60 + 5):
        add(window)
        for p in plain:
            if not p.done:
                p.add()
        proposal = torch.randint(1, VOCAB, (len(requests), width), generator=generator)
        # Few levels, so that equal confidences and exact thresholds occur.
        level = torch.randint(0, 11, (len(requests), width), generator=generator)
        confidence = level.float() / 10
        before = window.rows(torch.arange(len(requests)))
        result = step(window, proposal, confidence, MASK)
        for row, p in enumerate(plain):
            if done[row]:
                continue
            assert activated(before)[row, : before.open_R[row] : p.params.block_size].tolist() == (
                p.activated
            )
            p.step(proposal[row].tolist(), confidence[row].tolist())
            left = slice(int(result.emitted_R[row]), int(result.emit_R[row]))
            outputs[row] += result.tokens_RW[row, left].tolist()
            assert bool(result.done_R[row]) == p.done
            assert outputs[row] == p.left()
            decided, active = result.accepted_RW[row], result.active_RW[row]
            assert [int((decided & active).sum()), int((decided & ~active).sum())] == p.accepted
            assert int(result.dropped_R[row]) == p.dropped
            if p.done:
                done[row] = True
                continue
            live = [t for block in p.blocks for t in block]
            assert int(window.open_R[row]) == len(live)
            assert window.decoded_RW[row, : len(live)].tolist() == [t is not None for t in live]
            assert window.tokens_RW[row, : len(live)].tolist() == [
                MASK if t is None else t for t in live
            ]
            assert int(window.start_R[row]) == len(p.committed) - len(p.tail)
        if all(done):
            return
    pytest.fail("a request did not end within (positions + blocks) forwards")


@settings(max_examples=60, deadline=None)
@given(request_strategy, st.integers(0, 2**31))
def test_invariants_of_one_request(request_, seed):
    """A decided token never changes; every forward decides or commits; nothing is decided twice."""
    params, max_tokens, limit, ends, _ = request_
    generator = torch.Generator().manual_seed(seed)
    window = Window.empty(1, 28, 2, MASK)
    window.start([0], [Beginning(params, max_tokens, limit, sorted(ends))], MASK)
    blocks = math.ceil(max_tokens / params.block_size)
    decided: dict[int, int] = {}
    start = 0
    bound = max_tokens + params.block_size + blocks + 1
    for _ in range(bound):
        add(window)
        assert bool(activated(window)[0, 0])
        open_before = int(window.open_R)
        result = step(
            window,
            torch.randint(1, VOCAB, (1, 28), generator=generator),
            torch.rand(1, 28, generator=generator),
            MASK,
        )
        for column in result.accepted_RW[0].nonzero()[:, 0].tolist():
            assert start + column not in decided
            decided[start + column] = int(result.tokens_RW[0, column])
        for column in range(open_before):
            if start + column in decided:
                assert int(result.tokens_RW[0, column]) == decided[start + column]
        assert bool(result.accepted_RW.any()) or int(result.commit_R) > 0
        if bool(result.done_R):
            break
        start += int(result.commit_R)
        assert start % params.block_size == 0
        assert int(window.open_R) <= params.window
    else:
        pytest.fail(f"not done after {bound} forwards")


@given(st.integers(1, 20), st.integers(1, 9), st.lists(st.integers(0, 60), min_size=2, max_size=12))
def test_attention_rule(prompt_len, block_size, positions):
    position = torch.tensor(positions)
    blocks = [0 if p < prompt_len else 1 + (p - prompt_len) // block_size for p in positions]
    assert block_of(position, prompt_len, block_size).tolist() == blocks
    expected = [[bk <= bq for bk in blocks] for bq in blocks]
    mask = may_attend(position[:, None], position[None, :], prompt_len, block_size)
    assert mask.tolist() == expected


def test_block_causal_prompt_rule():
    position = torch.arange(14)
    # A prompt of 10 in blocks of 4, then answer blocks of 3.
    expected = [-2, -2, -2, -2, -1, -1, -1, -1, 0, 0, 1, 1, 1, 2]
    assert block_of(position, 10, 3, prompt_block=4).tolist() == expected
    assert block_of(torch.arange(9), 8, 3, prompt_block=4).tolist() == [-1] * 4 + [0] * 4 + [1]


def test_semi_activated_blocks_wait_below_the_threshold():
    window = Window.empty(1, 8, 1, MASK)
    params = D2FParams(4, 2, tau_add=0.25, tau_act=1.0, tau_conf=0.9)
    window.start([0], [Beginning(params, 8, 99, [])], MASK)
    token = torch.ones(1, 8, dtype=torch.int64)
    add(window)
    step(window, token, torch.full((1, 8), 0.5), MASK)
    assert window.decoded_RW[0].tolist() == [True, *[False] * 7]
    add(window)  # one of four decided: the second block opens, not activated
    assert int(window.open_R) == 8
    assert activated(window)[0].tolist() == [True] * 4 + [False] * 4
    confidence = torch.tensor([[0.1, 0.1, 0.2, 0.1, 0.95, 0.89, 0.9, 0.91]])
    step(window, token, confidence, MASK)
    assert window.decoded_RW[0].tolist() == [True, False, True, False, True, False, False, True]


def test_a_step_changes_the_window_in_place():
    window = Window.empty(1, 4, 1, MASK)
    window.start([0], [Beginning(D2FParams(4, 1), 4, 4, [])], MASK)
    tokens_RW, decoded_RW, counters = window.tokens_RW, window.decoded_RW, window.counters
    add(window)
    step(window, torch.ones(1, 4, dtype=torch.int64), torch.tensor([[0.95, 0.1, 0.1, 0.1]]), MASK)
    assert tokens_RW is window.tokens_RW and tokens_RW[0].tolist() == [1, MASK, MASK, MASK]
    assert decoded_RW is window.decoded_RW and decoded_RW[0].tolist() == [True, *[False] * 3]
    assert counters is window.counters


def decoded(params, confidences, *, active=True):
    """Return the positions of a block that a step decodes; behind an empty one it is not active."""
    size = len(confidences)
    window = Window.empty(1, 2 * size, 1, MASK)
    window.start([0], [Beginning(params, 2 * size, 99, [])], MASK)
    window.open_R[:] = 2 * size
    begin = 0 if active else size
    confidence = torch.full((1, 2 * size), -1.0)
    confidence[0, begin : begin + size] = torch.tensor(confidences)
    result = step(window, torch.ones(1, 2 * size, dtype=torch.int64), confidence, MASK)
    return result.accepted_RW[0, begin : begin + size].nonzero()[:, 0].tolist()


# In eighths and sixteenths, so that a sum is exact and a limit is met to the bit.
PROFILE = [0.5, 0.9375, 0.875, 1.0]  # columns in the order of confidence: 3, 1, 2, 0


@pytest.mark.parametrize(
    ("rule", "tau", "columns"),
    [
        # frechet: L_n - U_n is 1 - 0 = 1, then 0.9375 - 0.0625 = 0.875, then 0.8125 - 0.125 =
        # 0.6875, then 0.3125 - 0.5 < 0.
        ("frechet", 1.0, []),
        ("frechet", 0.9, [3]),
        ("frechet", 0.875, [3]),
        ("frechet", 0.8125, [1, 3]),
        ("frechet", 0.6875, [1, 3]),
        ("frechet", 0.625, [1, 2, 3]),
        ("frechet", 0.0, [1, 2, 3]),
        # factor: (n + 1) (1 - c_n) is 0, 3 / 16, 4 / 8, 5 / 2, and f is 1 - tau_conf.
        ("factor", 1.0, []),
        ("factor", 0.9, [3]),
        ("factor", 0.8125, [3]),
        ("factor", 0.75, [1, 3]),
        ("factor", 0.5, [1, 3]),
        ("factor", 0.4375, [1, 2, 3]),
        ("factor", 0.0, [1, 2, 3]),
        ("threshold", 0.9, [1, 3]),
        ("threshold", 0.9375, [3]),
    ],
)
def test_rules_worked_out_by_hand(rule, tau, columns):
    params = D2FParams(4, 2, tau_act=1.0, tau_conf=tau, accept=rule)
    assert decoded(params, PROFILE, active=False) == columns
    assert decoded(params, PROFILE) == (columns or [3])
    # A semi-activated block decodes nothing of what no rule accepts, an active one its best.
    assert decoded(params, [0.25, 0.5, 0.5, 0.0], active=False) == []
    assert decoded(params, [0.25, 0.5, 0.5, 0.0]) == [1]
    more = D2FParams(4, 2, tau_act=1.0, tau_conf=1.0, accept=rule, min_per_step=3)
    assert decoded(more, PROFILE) == [1, 2, 3]
    assert decoded(more, PROFILE, active=False) == []


@pytest.mark.parametrize(
    ("tau", "fewest", "columns"),
    [
        (0.9, 1, [1, 3]),
        (0.9375, 1, [3]),
        (0.9375, 2, [0, 3]),  # one is above, and the first masked one comes with it
        (0.9375, 3, [0, 1, 3]),
        (1.0, 1, [0]),
        (1.0, 3, [0, 1, 2]),  # SDAR's `sequential`
        (1.0, 9, [0, 1, 2, 3]),
    ],
)
def test_leftmost_worked_out_by_hand(tau, fewest, columns):
    params = D2FParams(4, 2, tau_act=1.0, tau_conf=tau, accept="leftmost", min_per_step=fewest)
    assert decoded(params, PROFILE) == columns
    above = [column for column, confidence in enumerate(PROFILE) if confidence > tau]
    assert decoded(params, PROFILE, active=False) == above
    # A position that must wait, and one without a distribution.
    assert decoded(params, [-1.0, 0.0, 0.5, -1.0]) == [1, 2][:fewest]


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.91, 0.97])
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.9])
def test_frechet_is_factor_where_confidences_are_equal(confidence, tau):
    frechet, factor = (
        D2FParams(7, 2, tau_act=1.0, tau_conf=tau, accept=rule) for rule in ("frechet", "factor")
    )
    columns = decoded(frechet, [confidence] * 7, active=False)
    assert columns == decoded(factor, [confidence] * 7, active=False)
    assert len(columns) == sum((n + 1) * (1 - confidence) < 1 - tau for n in range(1, 8))


@pytest.mark.parametrize(
    ("nats", "columns"),
    # Entropies: ln 4, ln 2, 0, and of (3/4, 1/4) 0.5623 nats.
    [(0, []), (0.5, [2]), (0.5623, [2]), (0.5624, [2, 3]), (0.693, [2, 3]), (0.694, [1, 2, 3]),
     (1.386, [1, 2, 3]), (1.387, [0, 1, 2, 3]), (20, [0, 1, 2, 3])],
)  # fmt: skip
def test_entropy_worked_out_by_hand(nats, columns):
    p = torch.tensor([[1, 1, 1, 1], [2, 2, 0, 0], [4, 0, 0, 0], [3, 1, 0, 0]]) / 4
    logits = torch.cat((p.log(), torch.full((4, 1), 9.0)), 1)  # the mask token is no candidate
    token, confidence = sample_greedy(logits, 4, torch.ones(4, dtype=torch.bool))
    assert token.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(confidence, torch.tensor([0.25, 0.5, 1.0, math.exp(-0.562335)]))
    params = D2FParams(4, 2, tau_act=1.0, tau_conf=nats, accept="entropy")
    assert decoded(params, confidence.tolist(), active=False) == columns
    assert decoded(params, confidence.tolist()) == (columns or [2])


@pytest.mark.parametrize("rule", ACCEPT)
def test_what_is_sure_counts_as_one_and_what_is_broken_as_nothing(rule):
    """Simulated confidences are 2, and a row without a distribution has 0."""
    params = D2FParams(4, 2, tau_act=1.0, tau_conf=0.0, accept=rule)
    expected = [] if rule == "entropy" else [1, 3]  # below 0 nats there is nothing but simulation
    assert decoded(params, [0.0, 2.0, 0.0, 2.0], active=False) == [1, 3]
    assert decoded(params, [0.0, 1.0, 0.0, 1.0], active=False) == expected


def test_only_the_rules_of_the_rows_are_computed(monkeypatch):
    computed = []

    def counted(name, accept):
        return lambda *rows: (computed.append(name), accept(*rows))[1]

    for name, rule in list(ACCEPT.items()):
        monkeypatch.setitem(strategies.ACCEPT, name, counted(name, rule))
    window = Window.empty(3, 4, 1, MASK)
    half = torch.full((3, 4), 0.75)
    for rules in (["threshold"] * 3, ["frechet", "frechet", "factor"]):
        window.rules = frozenset()
        for row, rule in enumerate(rules):
            params = D2FParams(4, 1, accept=rule)
            window.start([row], [Beginning(params, 4, 4, [])], MASK)
        computed.clear()
        add(window)
        step(window.rows(torch.arange(3)), torch.ones(3, 4, dtype=torch.int64), half, MASK)
        assert sorted(computed) == sorted(set(rules))


@pytest.mark.parametrize(
    ("field_", "value"),
    [
        ("block_size", 0),
        ("block_size", 1.5),
        ("block_size", True),
        ("max_blocks", -1),
        ("tau_add", 1.1),
        ("tau_act", -0.1),
        ("tau_conf", "0.9"),
        ("tau_conf", float("nan")),
        ("min_per_step", 0),
        ("min_per_step", 2.0),
        ("cut_last_block", 2),
        ("accept", "bold"),
        ("accept", None),
        ("accept", ["threshold"]),
    ],
)
def test_bad_params_are_refused_by_name(field_, value):
    with pytest.raises(ValueError, match=field_):
        D2FParams(**{field_: value})


@pytest.mark.parametrize("tau_conf", [-0.1, 20.1, math.nan, "1"])
def test_entropies_are_nats_in_their_own_range(tau_conf):
    assert D2FParams(tau_conf=20, accept="entropy").tau > 0
    with pytest.raises(ValueError, match=r"tau_conf must be a number in \[0, 20\] nats, got"):
        D2FParams(tau_conf=tau_conf, accept="entropy")
