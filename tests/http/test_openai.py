# SPDX-License-Identifier: Apache-2.0
"""The official `openai` client against `vllm serve d2f-tiny`."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from http_server import MODEL

from vllm_d2f.demo import bundled_problems

PROBLEM = bundled_problems()[0]
MAX_TOKENS = 64


def complete(client: openai.OpenAI, prompt: str, **options) -> str:
    """Return the text of one completion, greedy unless `options` say otherwise."""
    options = {"temperature": 0, "max_tokens": MAX_TOKENS} | options
    return client.completions.create(model=MODEL, prompt=prompt, **options).choices[0].text


def chat(client: openai.OpenAI, content: str, **options) -> str:
    options = {"temperature": 0, "max_tokens": MAX_TOKENS} | options
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, **options)
    return answer.choices[0].message.content


def test_lists_the_model_by_the_name_it_was_started_with(client):
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completion_is_right(client):
    answer = client.completions.create(
        model=MODEL, prompt=PROBLEM.question, temperature=0, max_tokens=MAX_TOKENS
    )
    choice = answer.choices[0]
    assert choice.text.strip() == PROBLEM.answer.strip()
    assert choice.finish_reason == "stop"
    assert 0 < answer.usage.completion_tokens < MAX_TOKENS


def test_greedy_is_the_default(client):
    greedy = complete(client, PROBLEM.question)
    for _ in range(2):
        answer = client.completions.create(
            model=MODEL, prompt=PROBLEM.question, max_tokens=MAX_TOKENS
        )
        assert answer.choices[0].text == greedy


def test_streamed_completion_is_the_unstreamed_one(client):
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=PROBLEM.question,
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    whole = client.completions.create(
        model=MODEL, prompt=PROBLEM.question, temperature=0, max_tokens=MAX_TOKENS
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_blocks_are_streamed_as_they_are_committed(client):
    """An answer of several blocks comes in several pieces."""
    chunks = client.completions.create(
        model=MODEL,
        prompt=PROBLEM.question,
        temperature=0,
        max_tokens=32,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {"d2f_block_size": 4}},
    )
    assert sum(bool(chunk.choices[0].text) for chunk in chunks) > 1


def test_chat_is_right_and_streams_the_same(client):
    whole = chat(client, PROBLEM.question)
    assert whole.strip() == PROBLEM.answer.strip()
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROBLEM.question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def draw(client: openai.OpenAI, **options) -> list:
    """Choices drawn so hot that even a model that is sure of everything is not of these."""
    options |= {"temperature": 2.0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
    # Of a prompt it does not understand it would make special tokens only, which are not shown.
    options["logit_bias"] = {str(token): -100 for token in (0, 2, 3)}
    return client.completions.create(model=MODEL, prompt="pens 1 +", **options).choices


def test_n_answers_are_drawn_independently_and_repeatably(client):
    """Greedy decoding has one answer, so vLLM wants n = 1 there (tests of bad input)."""
    first, second = (draw(client, n=2, seed=3) for _ in range(2))
    assert [choice.index for choice in first] == [0, 1]
    assert first[0].text != first[1].text
    assert [choice.text for choice in first] == [choice.text for choice in second]


def test_a_seed_repeats_a_draw(client):
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 7}
    first = complete(client, PROBLEM.question, **options)
    assert complete(client, PROBLEM.question, **options) == first


def test_draws_without_a_seed_differ(client):
    assert len({choice.text for choice in draw(client, n=8)}) > 1


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = complete(client, PROBLEM.question)
    head, equals, _ = whole.partition("=")
    assert equals, "a worked answer has an equals sign"
    answer = client.completions.create(
        model=MODEL, prompt=PROBLEM.question, temperature=0, max_tokens=MAX_TOKENS, stop="="
    )
    assert answer.choices[0].text == head
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_max_tokens_cuts_the_answer(client, max_tokens):
    answer = client.completions.create(
        model=MODEL, prompt=PROBLEM.question, temperature=0, max_tokens=max_tokens
    )
    assert answer.usage.completion_tokens == max_tokens
    assert answer.choices[0].finish_reason == "length"
    text = answer.choices[0].text
    assert text and complete(client, PROBLEM.question).startswith(text)


def test_a_prompt_with_the_mask_token_is_answered(client):
    """To the model it is a prompt token like any other."""
    answer = client.completions.create(
        model=MODEL,
        prompt=f"<|mask|> {PROBLEM.question} <|mask|>",
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert "<|mask|>" not in answer.choices[0].text


SETTINGS = (
    {},
    {"d2f_tau_conf": 0.95},
    {"d2f_tau_conf": 1.0, "d2f_max_blocks": 1},
    {"d2f_block_size": 8, "d2f_tau_add": 0.9, "d2f_tau_act": 1.0},
    {"d2f_block_size": 4, "d2f_max_blocks": 8},
)


def test_concurrent_requests_keep_their_own_settings(client):
    """Each answer of a mixed load equals the one that the same request gets alone."""
    requests = [
        (problem.question, {"vllm_xargs": xargs} if xargs else {})
        for problem in bundled_problems()[:4]
        for xargs in SETTINGS
    ]

    def ask(request) -> str:
        prompt, body = request
        return complete(client, prompt, extra_body=body)

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(ask, requests)) == alone


def test_counters_of_the_decoding_are_published(client, server):
    """vLLM's own diffusion counters, from which a dashboard gets tokens per forward."""
    complete(client, PROBLEM.question)
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("denoising_steps", "committed_tokens"):
        line = next(
            line
            for line in text.splitlines()
            if line.startswith(f"vllm:diffusion_num_{name}_total")
        )
        assert float(line.rsplit(" ", 1)[1]) > 0


def test_tools_need_the_servers_flags(client):
    """As for any model in vLLM; the refusal names them."""
    tool = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": PROBLEM.question}]
    with pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice"):
        client.chat.completions.create(model=MODEL, messages=messages, tools=[tool])
