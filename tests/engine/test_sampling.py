# SPDX-License-Identifier: Apache-2.0
"""Every sampling parameter: the engine says what the reference says, with as many forwards."""

import pytest
from common import MAX_LEN, WINDOW, random_prompts
from rules import Rule, engine_answers, engine_outputs, reference_answers

from benchmarks.parity import preemptions, shut_down, start_engine
from vllm_d2f.d2f import D2FParams

END = 199
COMMON = [103, 84, 115, 110, 158, 98, 13]  # what this model likes to say
DRAWN = dict(temperature=0.8, seed=11)

OPTIONS = {
    "plain": {},
    "temperature": DRAWN,
    "top_p": DRAWN | dict(top_p=0.7),
    "top_k": DRAWN | dict(top_k=4),
    "min_p": DRAWN | dict(min_p=0.1),
    "logit_bias": dict(logit_bias={7: 6.0, 84: -100.0, 103: -5.0}),
    "logit_bias, drawn": DRAWN | dict(logit_bias={7: 6.0}),
    "allowed_token_ids": dict(allowed_token_ids=[*range(40, 90), END]),
    "min_tokens": dict(min_tokens=20, stop_token_ids=COMMON),
    "stop_token_ids": dict(stop_token_ids=COMMON[:3]),
    "ignore_eos": dict(ignore_eos=True, logit_bias={END: 8.0}),
    "repetition_penalty": dict(repetition_penalty=1.4),
    "presence_penalty": dict(presence_penalty=1.9),
    "frequency_penalty": dict(frequency_penalty=2.0),
    "negative frequency_penalty": dict(frequency_penalty=-2.0),
    "penalties, drawn": DRAWN
    | dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
    "logprobs": dict(logprobs=5),
    "logprobs, drawn": DRAWN | dict(logprobs=0, repetition_penalty=1.2),
    "logprob_token_ids": dict(logprob_token_ids=[3, 9, 150]),
}


@pytest.fixture(scope="module")
def llm(dream):
    llm = start_engine(dream, window=WINDOW, max_model_len=MAX_LEN)
    yield llm
    shut_down(llm)


@pytest.fixture(scope="module")
def rules(dream):
    """Two prompts for each; bad words are taken from what the model says without them."""
    prompts = [tuple(p) for p in random_prompts(2 * len(OPTIONS), seed=77)]
    rules = [
        Rule(prompt, options)
        for prompt, options in zip(prompts, [*OPTIONS.values(), *OPTIONS.values()], strict=True)
    ]
    some = [Rule(p, o, params=D2FParams(4, 8, 0.1, 0.95, 0.7)) for p in prompts[:3] for o in SOME]
    for rule, known in zip(some, reference_answers(dream, some, MAX_LEN), strict=True):
        words = (known.tokens[1:3], known.tokens[4:7], known.tokens[2:3], known.tokens[9:11])
        rules.append(Rule(rule.prompt, rule.options, words, rule.params))
    return rules


SOME = [{}, DRAWN, dict(logprobs=2, repetition_penalty=1.3)]


@pytest.fixture(scope="module")
def expected(dream, rules):
    return reference_answers(dream, rules, MAX_LEN)


def check(rules, expected, got):
    for rule, want, have in zip(rules, expected, got, strict=True):
        assert have.tokens == want.tokens, rule
        assert have.forwards == want.forwards, rule
        if rule.options.get("logprobs") is not None:
            assert have.logprobs == pytest.approx(want.logprobs, abs=1e-3), rule


def test_together(llm, rules, expected):
    """All at once, plain requests among them."""
    check(rules, expected, engine_answers(llm, rules))
    # The rules do change answers: else these would be no tests.
    plain = [Rule(r.prompt, {}, params=r.params) for r in rules]
    answers = engine_answers(llm, plain)
    names = [*OPTIONS, *OPTIONS]
    changed = {
        name
        for name, one, other in zip(names, expected, answers, strict=False)
        if one.tokens != other.tokens
    }
    assert changed >= OPTIONS.keys() - {"plain", "logprobs", "logprob_token_ids"}
    assert all(
        one.tokens != other.tokens
        for rule, one, other in zip(rules, expected, answers, strict=True)
        if rule.bad_words
    )


def test_one_by_one(llm, rules, expected):
    some = slice(None, len(OPTIONS))
    check(rules[some], expected[some], [engine_answers(llm, [rule])[0] for rule in rules[some]])


@pytest.fixture(scope="module")
def seeded():
    """32 requests at temperature 0.8, each with a seed of its own."""
    prompts = random_prompts(32, seed=9)
    return [
        Rule(tuple(prompt), dict(temperature=0.8, seed=seed), max_tokens=48)
        for seed, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def alone(llm, seeded):
    return [engine_answers(llm, [rule])[0] for rule in seeded]


def test_a_seed_gives_one_text_alone_and_in_a_batch_of_32(llm, seeded, alone):
    assert engine_answers(llm, seeded) == alone
    assert engine_answers(llm, seeded[::-1])[::-1] == alone
    assert len({answer.tokens for answer in alone}) == 32
    other = [Rule(rule.prompt, dict(temperature=0.8, seed=99), max_tokens=48) for rule in seeded]
    answers = engine_answers(llm, other)
    assert all(one.tokens != two.tokens for one, two in zip(alone, answers, strict=True))


def test_rows_of_one_request_in_several_chunks(llm, rules, expected):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    proposals = worker.model_runner.sampler.proposals
    rows, proposals.rows_per_chunk = proposals.rows_per_chunk, 7
    try:
        check(rules, expected, engine_answers(llm, rules))
    finally:
        proposals.rows_per_chunk = rows


def test_the_rules_hold(llm, rules, expected):
    """Of the text itself, whatever the reference says."""
    for rule, answer in zip(rules, expected, strict=True):
        tokens, options = list(answer.tokens), rule.options
        if "allowed_token_ids" in options:
            assert set(tokens) <= set(options["allowed_token_ids"])
        if stops := options.get("stop_token_ids"):
            early = options.get("min_tokens", 0)
            assert not set(tokens[:early]) & {*stops, END}
            assert len(tokens) >= early
            assert not set(tokens[early:-1]) & {*stops, END}
        if options.get("ignore_eos"):
            assert len(tokens) == 32 and END in tokens
        for word in rule.bad_words:
            places = range(len(tokens) - len(word) + 1)
            assert not any(tuple(tokens[at : at + len(word)]) == word for at in places)
        if 84 in options.get("logit_bias", {}):
            assert 84 not in tokens
    assert any(rule.bad_words for rule in rules)


def test_penalties_grow_with_repetition(llm, dream):
    """A strong frequency penalty spreads the tokens, a negative one piles them up."""
    prompts = [tuple(p) for p in random_prompts(8, seed=5)]

    def different(**options) -> int:
        answers = engine_answers(llm, [Rule(p, dict(ignore_eos=True) | options) for p in prompts])
        return sum(len(set(answer.tokens)) for answer in answers)

    assert different(frequency_penalty=-2.0) < different() < different(frequency_penalty=2.0)
    assert different(repetition_penalty=0.5) < different() < different(repetition_penalty=2.0)


def test_logprobs_stand_beside_their_tokens(llm, rules):
    """Rank 1 is the most likely token, the list is sorted, and it is as long as was asked."""
    asked = [Rule(rule.prompt, dict(logprobs=5)) for rule in rules[:6]]
    wide = [Rule(rule.prompt, dict(logprobs=20)) for rule in rules[:2]]
    for rule, output in zip(asked + wide, engine_outputs(llm, asked + wide), strict=True):
        completion = output.outputs[0]
        assert len(completion.logprobs) == len(completion.token_ids)
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            # Greedy and without other rules: the chosen token is the most likely one.
            assert entry[token].rank == 1
            assert len(entry) == rule.options["logprobs"]
            values = [item.logprob for item in entry.values()]
            assert values == sorted(values, reverse=True)
            assert 0 < sum(map(pow, [2.718281828] * len(values), values)) < 1.0001
    only = Rule(rules[0].prompt, dict(logprob_token_ids=[3, 9, 150]))
    completion = engine_outputs(llm, [only])[0].outputs[0]
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry.keys() == {token, 3, 9, 150}


def test_repetition_ends_an_answer(llm):
    """vLLM's own check, over tokens that leave several at a time."""
    from vllm.sampling_params import RepetitionDetectionParams

    same = dict(logit_bias={7: 100.0}, ignore_eos=True)
    watched = same | dict(
        repetition_detection=RepetitionDetectionParams(max_pattern_size=2, min_count=5)
    )
    whole, cut = engine_outputs(llm, [Rule((1, 2, 3), same), Rule((1, 2, 3), watched)])
    assert set(whole.outputs[0].token_ids) == {7} and len(whole.outputs[0].token_ids) == 32
    assert list(cut.outputs[0].token_ids) == [7] * 5
    assert cut.outputs[0].stop_reason == "repetition_detected"


def test_who_asks_for_nothing_pays_nothing(llm, rules, monkeypatch):
    """Plain requests leave no trace in what rules need, and rules none behind them."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    states, proposals = (
        worker.model_runner.model_state.states,
        worker.model_runner.sampler.proposals,
    )
    engine_outputs(llm, rules[:20])
    found, list_rows = [], proposals._rows

    def watched(*args):
        rows, end_D = list_rows(*args)
        found.append(end_D is not None)
        return rows, end_D

    monkeypatch.setattr(proposals, "_rows", watched)
    plain = [Rule(rule.prompt, {}) for rule in rules[:4]]
    engine_outputs(llm, plain)
    assert states.samplers == {} and states.preempted == {}
    assert found and not any(found)
    engine_outputs(llm, [*plain, rules[5]])
    assert any(found)


def test_refused_offline(llm, dream):
    """What HTTP answers with 400 (tests/http), and what only offline requests can say."""
    from vllm.exceptions import VLLMValidationError

    refused = [
        (dict(prompt_logprobs=1), "prompt_logprobs: not supported.*bidirectional"),
        (dict(allowed_token_ids=[198]), "no token is left"),
        (dict(allowed_token_ids=[END], min_tokens=3), "no token is left"),
        (dict(allowed_token_ids=[5], bad_words=["a"]), "bad_words: not supported"),
        (dict(logit_bias={3: float("nan")}), "must be finite"),
        (dict(logit_bias={3000: 1.0}), "out-of-vocab"),
        (dict(seed=1 << 63), "seed: must be an integer in"),
        (dict(logprobs=21), "greater than max allowed: 20"),
        (dict(thinking_token_budget=5), "thinking_token_budget: not supported"),
    ]
    for options, message in refused:
        with pytest.raises((VLLMValidationError, ValueError), match=message):
            engine_outputs(llm, [Rule((1, 2, 3), options)])
    assert engine_answers(llm, [Rule((1, 2, 3), {})])[0].tokens


def test_z_preemption_changes_nothing(dream, rules, expected, seeded, alone):
    """Few pages: windows, penalties, bad words, log-probabilities and seeds survive."""
    pages = -(-MAX_LEN // 32) + 8
    llm = start_engine(
        dream, window=WINDOW, max_model_len=MAX_LEN, num_gpu_blocks_override=pages, max_num_seqs=24
    )
    check(rules, expected, engine_answers(llm, rules))
    before = preemptions(llm)
    assert before > 0
    assert engine_answers(llm, seeded) == alone
    assert preemptions(llm) > before
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert worker.model_runner.model_state.states.preempted == {}
    shut_down(llm)
