# SPDX-License-Identifier: Apache-2.0
"""Rules over logits against a plain loop in float64, one row and one token at a time."""

import math

import pytest
import torch
from vllm.sampling_params import SamplingParams

from vllm_d2f.d2f import D2FParams
from vllm_d2f.sampling.logits_processors import LogitProcessor, LogitRules
from vllm_d2f.sampling.logprobs import LogprobStore, take_all
from vllm_d2f.sampling.request_sampler import make_request_sampler
from vllm_d2f.sampling.sample import Sampling, sample_greedy

VOCAB = 23
PROMPT = [3, 3, 7, 11]
ANSWER = [5, 7, 5, 5, 2]
POSITIONS = [5, 6, 9, 14]

RULES = {
    "allowed": LogitRules(allowed=(1, 5, 9)),
    "bias": LogitRules(bias=((4, 2.5), (7, -100.0))),
    "banned": LogitRules(banned=(0, 22)),
    "allowed, biased and banned": LogitRules(allowed=(1, 5, 9), bias=((5, 1.0),), banned=(9,)),
    "min tokens": LogitRules(min_tokens=9, stops=(2, 8)),
    "repetition": LogitRules(repetition=1.7),
    "repetition below 1": LogitRules(repetition=0.6),
    "presence": LogitRules(presence=0.9),
    "frequency": LogitRules(frequency=-0.4),
    "everything": LogitRules(
        allowed=tuple(range(20)),
        bias=((3, 0.5),),
        banned=(6,),
        min_tokens=7,
        stops=(2,),
        repetition=1.3,
        presence=0.2,
        frequency=0.3,
    ),
}


def plain(rules: LogitRules, logits: list[list[float]]) -> list[list[float]]:
    """Return the rules as vLLM documents them."""
    out = []
    for row, position in zip(logits, POSITIONS, strict=True):
        new = []
        for token, value in enumerate(row):
            if rules.allowed is not None and token not in rules.allowed:
                value = -math.inf
            value += sum(bias for biased, bias in rules.bias if biased == token)
            if position < rules.min_tokens and token in rules.stops:
                value = -math.inf
            if token in PROMPT or token in ANSWER:
                value = value / rules.repetition if value > 0 else value * rules.repetition
            value -= rules.frequency * ANSWER.count(token) + rules.presence * (token in ANSWER)
            new.append(-math.inf if token in rules.banned else value)
        out.append(new)
    return out


@pytest.mark.parametrize("name", RULES)
def test_rules_equal_a_plain_loop(name):
    rules = RULES[name]
    logits = torch.randn(len(POSITIONS), VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    expected = torch.tensor(plain(rules, logits.tolist()), dtype=torch.float64)
    processor = LogitProcessor(rules, torch.tensor(PROMPT), VOCAB, "cpu")
    # Masked positions are among the decoded ones.
    answer = torch.tensor([VOCAB, *ANSWER, VOCAB, VOCAB])
    processor.apply(logits, torch.tensor(POSITIONS), answer)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)
    assert not rules.empty


def test_rules_come_from_sampling_params():
    params = SamplingParams(
        logit_bias={4: 1.5},
        allowed_token_ids=[1, 2, 3],
        min_tokens=2,
        stop_token_ids=[9],
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
    )
    params._bad_words_token_ids = [[6], [7, 8]]
    assert LogitRules.of(params) == LogitRules((1, 2, 3), ((4, 1.5),), (6,), 2, (9,), 1.1, 0.2, 0.3)
    assert LogitRules.of(SamplingParams(stop_token_ids=[9])).empty
    assert LogitRules.of(SamplingParams(min_tokens=2)).empty  # there is nothing to hold off


def own_sampler(params: SamplingParams, **options):
    settings = dict(
        prompt=PROMPT,
        sampling=Sampling.greedy(1),
        ends=[],
        d2f=D2FParams(tau_conf=0.9),
        mask_id=0,
        vocab_size=VOCAB,
        window=16,
    )
    return make_request_sampler(params, **settings | options)


def test_who_asks_for_nothing_has_no_sampler_of_its_own():
    assert (
        own_sampler(SamplingParams(temperature=0.7, top_p=0.5, seed=3, stop_token_ids=[4])) is None
    )


def test_logprobs_are_those_of_the_model_and_of_the_last_write():
    """At temperature 0 a token's log-probability is the log of its confidence."""
    asked = own_sampler(SamplingParams(temperature=0, logprobs=3))
    store = asked.logprobs
    generator = torch.Generator().manual_seed(1)
    for positions in ([0, 1, 2, 3], [1, 3]):
        logits = torch.randn(len(positions), VOCAB, generator=generator) * 2
        plain_token, plain_confidence = sample_greedy(logits.clone(), 0)
        at = torch.tensor(positions)
        token, confidence = asked.sample(logits.clone(), at, torch.tensor(1), None)
        assert torch.equal(token, plain_token)
        torch.testing.assert_close(confidence, plain_confidence)
        for row, position in enumerate(positions):
            assert store.at(position) == pytest.approx(math.log(confidence[row]), abs=1e-6)
    logits[:, 0] = -torch.inf
    expected = logits.double().log_softmax(-1)
    store.take(1, 1)
    token_NK, value_NK, rank_N = store.take(1, 1)
    top = expected[0].topk(3)
    assert token_NK[0].tolist() == [int(top.indices[0]), *top.indices.tolist()]
    torch.testing.assert_close(value_NK[0, 1:].double(), top.values, rtol=1e-5, atol=1e-6)
    assert rank_N.tolist() == [1]


def test_logprobs_come_before_all_rules():
    biased = own_sampler(SamplingParams(temperature=0, logprobs=1, logit_bias={5: 100.0}))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    expected = logits.clone()
    expected[:, 0] = -torch.inf
    expected = expected.log_softmax(-1)[0]
    token, confidence = biased.sample(logits, torch.tensor([0]), torch.tensor(1), None)
    token_NK, value_NK, rank_N = biased.logprobs.take(1, 1)
    assert token.item() == token_NK[0, 0] == 5
    assert confidence.item() == pytest.approx(1)
    assert value_NK[0, 0].item() == pytest.approx(expected[5].item(), abs=1e-6)
    assert rank_N.item() == 1 + int((expected > expected[5]).sum())
    assert token_NK[0, 1] == expected.argmax()


def test_logprobs_of_given_tokens_raw_logits_and_all():
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3))
    at, token = torch.tensor([6, 7]), torch.tensor([4, 5])
    given = LogprobStore(8, 0, [9, 2], "raw_logits", "cpu")
    given.write(logits, at, token)
    given.take(6, 0)
    token_NK, value_NK, _ = given.take(2, 2)
    assert token_NK.tolist() == [[4, 9, 2], [5, 9, 2]]
    assert torch.equal(value_NK, logits.gather(1, token_NK))
    everything = LogprobStore(4, VOCAB, None, "raw_logprobs", "cpu")
    everything.write(logits, at, token)
    everything.take(6, 0)
    token_NK, value_NK, _ = everything.take(2, 2)
    assert sorted(token_NK[0, 1:].tolist()) == list(range(VOCAB))
    torch.testing.assert_close(value_NK[:, 1:].exp().sum(1), torch.ones(2))


def test_what_is_emitted_is_in_order_and_as_wide_as_the_widest():
    """Requests that did not ask have no rows, and prefills stand behind all of them."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4))
    at, token = torch.arange(4), torch.tensor([1, 2, 3, 4])
    stores = [LogprobStore(4, num, None, "raw_logits", "cpu") for num in (1, 3)]
    for store in stores:
        store.write(logits, at, token)
    count, most = torch.tensor([5, 2, 1, 2]), [5, 2, 1, 3]
    token_NK, value_NK, rank_N, begin = take_all([None, stores[0], None, stores[1]], count, most)
    assert begin == [0, 0, 2, 2, 5]
    assert token_NK[:, 0].tolist() == [1, 2, 1, 2, 3]
    assert value_NK.shape == (5, 4) and rank_N.shape == (5,)
    assert (value_NK[:2, 2:] == -torch.inf).all() and value_NK[2:].isfinite().all()
    token_NK, *_, begin = take_all(stores, torch.tensor([2, 1]), [2, 1])
    assert token_NK[:, 0].tolist() == [3, 4, 3] and begin == [0, 2, 3]
