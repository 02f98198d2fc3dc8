# SPDX-License-Identifier: Apache-2.0
"""What the server refuses: HTTP 400 with a message that names the remedy. It goes on serving."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from http_server import MODEL

from vllm_d2f.demo import bundled_problems

PROBLEM = bundled_problems()[1]


def ask(client: openai.OpenAI, **options) -> str:
    options = {"prompt": PROBLEM.question, "temperature": 0, "max_tokens": 64} | options
    return client.completions.create(model=MODEL, **options).choices[0].text


@pytest.fixture(scope="module")
def good_answer(client) -> str:
    return ask(client)


def xargs(**values) -> dict:
    return {"extra_body": {"vllm_xargs": values}}


# Test id -> the request's options, and what the message must contain.
REFUSED = {
    "unknown option": (xargs(d2f_speed=2), ["d2f_speed", "d2f_tau_conf"]),
    "another diffusion's option": (xargs(diffusion_steps=2), ["diffusion_steps", "d2f_tau_conf"]),
    "tau_conf above 1": (xargs(d2f_tau_conf=1.5), ["d2f_tau_conf", "[0, 1]", "1.5"]),
    "tau_add below 0": (xargs(d2f_tau_add=-0.1), ["d2f_tau_add", "[0, 1]"]),
    "tau_act no number": (xargs(d2f_tau_act="high"), ["d2f_tau_act", "number"]),
    "unknown rule": (
        xargs(d2f_accept="bold"),
        ["d2f_accept", "threshold, frechet, factor, entropy, leftmost"],
    ),
    "rule without its threshold": (xargs(d2f_accept="factor"), ["d2f_accept", "d2f_tau_conf"]),
    "entropy above 20": (
        xargs(d2f_accept="entropy", d2f_tau_conf=21),
        ["d2f_tau_conf", "[0, 20] nats"],
    ),
    "rule of a block in a structured output": (
        {
            "extra_body": {
                "vllm_xargs": {"d2f_accept": "frechet", "d2f_tau_conf": 0.5},
                "structured_outputs": {"regex": "a*"},
            }
        },
        ["d2f_accept frechet", "threshold or entropy or leftmost"],
    ),
    "block size 0": (xargs(d2f_block_size=0), ["d2f_block_size", "[1, "]),
    "block size negative": (xargs(d2f_block_size=-16), ["d2f_block_size", "[1, "]),
    "block size of a fraction": (xargs(d2f_block_size=7.5), ["d2f_block_size", "integer"]),
    "block too wide": (xargs(d2f_block_size=100_000), ["d2f_block_size", "[1, "]),
    "max blocks 0": (xargs(d2f_max_blocks=0), ["d2f_max_blocks", "[1, "]),
    "window too wide": (
        xargs(d2f_block_size=32, d2f_max_blocks=64),
        ["d2f_block_size * d2f_max_blocks", "2048", "--additional-config"],
    ),
    "two greedy answers": ({"n": 2}, ["n must be 1", "greedy"]),
    "two answers by default": (
        {"n": 2, "temperature": openai.omit},
        ["n must be 1", "default temperature of this model is 0", "0.7"],
    ),
    "prompt logprobs": (
        {"extra_body": {"prompt_logprobs": 1}},
        ["prompt_logprobs", " not "],
    ),
    "broken regex": (
        {"extra_body": {"structured_outputs": {"regex": "("}}},
        ["regex"],
    ),
    "trace of a stream": (
        {"stream": True, **xargs(d2f_trace=1)},
        ["d2f_trace", "stream"],
    ),
    "prompt too long": ({"prompt": "Leo has 73 pens. " * 200}, ["maximum context length", "512"]),
    "prompt and answer too long": ({"max_tokens": 5000}, ["max_tokens", "512"]),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_remedy(client, good_answer, name, stream):
    """A stream too gets a status, not an event after HTTP 200."""
    options, expected = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, **(options | ({"stream": True} if stream else {})))
    assert refusal.value.status_code == 400
    message = refusal.value.body["message"]
    for part in expected:
        assert part in message
    assert ask(client) == good_answer


def test_chat_refuses_the_same_way(client, good_answer):
    with pytest.raises(openai.BadRequestError, match="d2f_tau_conf must be a number in"):
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": PROBLEM.question}],
            extra_body={"vllm_xargs": {"d2f_tau_conf": 2}},
        )
    assert ask(client) == good_answer


def test_an_unknown_model_is_not_found(client, good_answer):
    with pytest.raises(openai.NotFoundError, match="d2f-huge"):
        client.completions.create(model="d2f-huge", prompt="1")
    assert ask(client) == good_answer


def test_a_bad_request_among_good_ones_hurts_nobody(client, good_answer):
    def bad_or_good(i: int) -> str:
        if i % 2:
            return ask(client)
        with pytest.raises(openai.BadRequestError):
            ask(client, **xargs(d2f_tau_conf=3))
        return good_answer

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(bad_or_good, range(16))) == {good_answer}
