# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters, log-probabilities and structured outputs through the HTTP API."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
from http_server import MODEL

from vllm_d2f.demo import bundled_problems

PROBLEMS = bundled_problems()
QUESTION, ANSWER = PROBLEMS[0].question, PROBLEMS[0].answer.strip()
DIGITS = [str(digit) for digit in range(10)]


def complete(client, prompt=QUESTION, **options):
    options = {"temperature": 0, "max_tokens": 64} | options
    return client.completions.create(model=MODEL, prompt=prompt, **options).choices[0]


def chat(client, **options):
    options = {"temperature": 0, "max_tokens": 64} | options
    messages = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options).choices[0]


@pytest.fixture(scope="module")
def ids(server):
    """Token ids by text, as the server tells them."""
    import httpx

    def ids(text: str) -> list[int]:
        answer = httpx.post(f"{server.url}/tokenize", json={"model": MODEL, "prompt": text})
        return answer.json()["tokens"]

    return ids


def test_logit_bias_and_allowed_token_ids(client, ids):
    equals = ids("=")[0]
    assert "=" in complete(client).text
    assert "=" not in complete(client, logit_bias={str(equals): -100}).text
    assert "=" not in chat(client, logit_bias={str(equals): -100}).message.content
    allowed = [token for digit in DIGITS for token in ids(digit)]
    only = complete(client, max_tokens=20, extra_body={"allowed_token_ids": allowed})
    assert re.fullmatch("[0-9]{20}", only.text)


def test_min_tokens(client):
    """A text that would have ended goes on, and one that is cut has no room to."""
    whole = client.completions.create(model=MODEL, prompt=QUESTION, temperature=0, max_tokens=64)
    tokens = whole.usage.completion_tokens
    longer = client.completions.create(
        model=MODEL,
        prompt=QUESTION,
        temperature=0,
        max_tokens=64,
        extra_body={"min_tokens": tokens + 5},
    )
    assert tokens + 5 <= longer.usage.completion_tokens <= 64
    assert longer.choices[0].text.startswith(whole.choices[0].text[:-2])


def test_bad_words(client):
    """One token, and several; with a space before them and without."""
    # The question names the things; asked to repeat itself the model says numbers and signs.
    for word in ("=", ANSWER[:4], ANSWER[3:6]):
        assert word in complete(client).text
        assert word not in complete(client, extra_body={"bad_words": [word]}).text


def test_penalties(client):
    """Against repetition, and for it."""

    def different(**more) -> int:
        body = {"min_tokens": 60} | more.pop("extra_body", {})
        return len(set(complete(client, PROBLEMS[2].question, **more, extra_body=body).text))

    assert different(frequency_penalty=2.0) > different() > different(frequency_penalty=-2.0)
    assert different(presence_penalty=2.0) > different()
    assert different(extra_body={"repetition_penalty": 1.8}) > different()


def test_stop_strings_and_whether_they_are_shown(client):
    head = ANSWER.partition("=")[0]
    assert complete(client, stop="=").text == head
    shown = complete(client, stop=["="], extra_body={"include_stop_str_in_output": True})
    assert shown.text == f"{head}=" and shown.finish_reason == "stop"


def test_stop_token_ids(client, ids):
    stopped = complete(client, extra_body={"stop_token_ids": ids("=")})
    assert stopped.text.rstrip("=") == ANSWER.partition("=")[0]
    assert stopped.stop_reason == ids("=")[0]


def test_echo(client):
    answer = complete(client).text
    assert complete(client, echo=True).text == QUESTION + answer
    assert complete(client, echo=True, max_tokens=0).text == QUESTION


def test_logprobs_of_completions(client):
    """Sorted, aligned with the text, and as sure as the model is of what it can do."""
    choice = complete(client, logprobs=3)
    plain = complete(client)
    assert choice.text == plain.text
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens).startswith(choice.text)
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert max(top.values()) == value == top[token]
        assert math.exp(value) > 0.5
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset : offset + len(token)] in (token, "")


def test_logprobs_of_chats_streamed_and_whole(client):
    whole = chat(client, logprobs=True, top_logprobs=2)
    entries = whole.logprobs.content
    assert "".join(entry.token for entry in entries).startswith(whole.message.content)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    messages = [{"role": "user", "content": QUESTION}]
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_tokens=64,
        stream=True,
        logprobs=True,
        top_logprobs=2,
    )
    streamed = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [e.token for e in streamed] == [e.token for e in entries]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-4)


# d2f-tiny is sure of its answers: at 0.8 it draws the right one nearly always. The second row asks
# what it does not understand, special tokens excepted because they are not shown.
@pytest.mark.parametrize(
    ("temperature", "question", "texts"), [(0.8, None, len(PROBLEMS)), (2.0, "pens 1 +", 24)]
)
def test_a_seed_gives_one_text_alone_and_among_32(client, temperature, question, texts):
    def draw(seed: int) -> str:
        prompt = question or PROBLEMS[seed % len(PROBLEMS)].question
        options = {"temperature": temperature, "seed": seed, "extra_body": {"ignore_eos": True}}
        if question:
            options["logit_bias"] = {str(token): -100 for token in (0, 2, 3)}
        return complete(client, prompt, **options).text

    alone = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(draw, range(32)))
    assert together[:8] == alone
    assert len(set(together)) >= texts


SCHEMA = {
    "type": "object",
    "properties": {
        "thing": {"enum": ["pens", "eggs"]},
        "left": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["thing", "left"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "sale", "schema": SCHEMA}}


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_response_format(client, temperature):
    options = {"temperature": temperature, "seed": 4, "max_tokens": 300}
    content = chat(client, response_format=FORMAT, **options).message.content
    jsonschema.validate(json.loads(content), SCHEMA)
    text = complete(client, **options, extra_body={"response_format": FORMAT}).text
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[0-9]{2} (pens|eggs)"}, "[0-9]{2} (pens|eggs)"),
        ({"choice": ["many pens", "no pens"]}, "many pens|no pens"),
        ({"grammar": 'root ::= "left: " [0-9] [0-9]'}, "left: [0-9][0-9]"),
    ],
)
def test_structured_outputs(client, constraint, pattern):
    body = {"extra_body": {"structured_outputs": constraint}}
    assert re.fullmatch(pattern, complete(client, **body).text)
    assert re.fullmatch(pattern, chat(client, **body).message.content)
    chunks = client.completions.create(
        model=MODEL, prompt=QUESTION, temperature=0, max_tokens=64, stream=True, **body
    )
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    assert streamed == complete(client, **body).text


def test_structured_and_plain_requests_share_batches(client):
    plain = complete(client).text

    def ask(i: int) -> str:
        if i % 2:
            return complete(client).text
        return complete(client, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}}).text

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    assert set(answers[1::2]) == {plain}
    assert all(re.fullmatch("[0-9]{4}", text) for text in answers[::2])


# Test id -> the request's options, and what the message must contain.
REFUSED = {
    "echo with logprobs": ({"echo": True, "logprobs": 1}, ["prompt_logprobs", "bidirectional"]),
    "too many logprobs": ({"logprobs": 21}, ["21", "20"]),
    "penalty out of range": ({"presence_penalty": 2.5}, ["presence_penalty", "[-2, 2]"]),
    "min_tokens above max_tokens": ({"extra_body": {"min_tokens": 65}}, ["min_tokens", "64"]),
    "bias of a token there is not": ({"logit_bias": {"100000": 1}}, ["logit_bias", "100000"]),
    "nothing allowed": ({"extra_body": {"allowed_token_ids": [1]}}, ["no token is left"]),
    "bad regex": (
        {"extra_body": {"structured_outputs": {"regex": "([0-9]"}}},
        ["regex", "not closed"],
    ),
    "grammar and bad words": (
        {"extra_body": {"structured_outputs": {"choice": ["a"]}, "bad_words": ["b"]}},
        ["bad_words", "write them into the grammar"],
    ),
    "beam search": (
        {"n": 2, "extra_body": {"use_beam_search": True}},
        ["beam search", "not supported"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_remedy(client, name):
    options, expected = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as refusal:
        complete(client, **options)
    for part in expected:
        assert part in refusal.value.body["message"]
    assert complete(client).text.strip() == ANSWER
