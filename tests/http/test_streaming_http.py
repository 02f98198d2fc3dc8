# SPDX-License-Identifier: Apache-2.0
"""Streams over HTTP join to the unstreamed text; presets and the trace over HTTP."""

import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from http_server import MODEL

from vllm_d2f.demo import bundled_problems
from vllm_d2f.settings import PRESETS

PROBLEMS = bundled_problems()


def piecewise(client: openai.OpenAI, **options) -> tuple[str, str, int]:
    """Joined text, finish reason, and how many pieces had text."""
    chunks = [c.choices[0] for c in client.completions.create(**options, stream=True)]
    texts = [chunk.text for chunk in chunks]
    return "".join(texts), chunks[-1].finish_reason, sum(map(bool, texts))


def test_200_streams_join_to_the_unstreamed_text(client):
    """Stop strings inside blocks, characters cut across tokens, end tokens inside blocks."""
    rng = random.Random(3)
    requests = []
    for index in range(200):
        options = dict(model=MODEL, prompt=PROBLEMS[index % len(PROBLEMS)].question, seed=index)
        extra = {"d2f_block_size": rng.choice([4, 8, 16]), "d2f_tau_conf": rng.choice([0.5, 0.9])}
        options["max_tokens"] = rng.randint(20, 64)
        if index % 2:
            # So hot that bytes of characters come in any order, valid ones among them.
            options["temperature"] = 2.0
        if index % 4 > 1:
            options["stop"] = rng.choice([["\n"], ["=", "+"], ["so", "pens"], ["1", "2", "3"]])
        requests.append(options | {"extra_body": {"vllm_xargs": extra}})
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(lambda r: piecewise(client, **r), requests))
        wholes = list(pool.map(lambda r: client.completions.create(**r).choices[0], requests))
    for options, (text, reason, _), whole in zip(requests, streams, wholes, strict=True):
        assert (text, reason) == (whole.text, whole.finish_reason), options
    assert sum(pieces for _, _, pieces in streams) > 3 * len(streams)
    reasons = [reason for _, reason, _ in streams]
    assert reasons.count("stop") > 60 and reasons.count("length") > 20
    strange = [c for text, _, _ in streams for c in text if ord(c) > 127]
    assert "\ufffd" in strange


def test_text_leaves_before_its_block_is_full(client):
    """One block holds the whole answer, and still it comes in several pieces."""
    _, _, pieces = piecewise(
        client,
        model=MODEL,
        prompt=PROBLEMS[0].question,
        temperature=0,
        max_tokens=32,
        extra_body={
            "ignore_eos": True,
            "vllm_xargs": {"d2f_block_size": 32, "d2f_max_blocks": 1, "d2f_tau_conf": 1.0},
        },
    )
    assert pieces > 1


def ask(client, **xargs):
    return client.completions.create(
        model=MODEL,
        prompt=PROBLEMS[2].question,
        temperature=0,
        max_tokens=48,
        extra_body={"vllm_xargs": xargs},
    )


def test_a_preset_by_its_short_or_full_name(client):
    """The same decoding as with its values written out; what stands beside it is stronger."""

    def forwards(**xargs):
        return ask(client, d2f_trace=1, **xargs).kv_transfer_params["d2f"]["forwards"]

    values = {f"d2f_{name}": value for name, value in PRESETS["dream-humaneval"].items()}
    written = forwards(**values)
    assert forwards(d2f_preset="humaneval") == written
    assert forwards(d2f_preset="dream-humaneval") == written
    assert forwards(d2f_preset="humaneval", d2f_tau_conf=1.0) > written


@pytest.mark.parametrize(
    "xargs, expected",
    [
        ({"d2f_preset": "gsm9k"}, ["d2f_preset", "gsm8k", "llada-mbpp", "gsm9k"]),
        ({"d2f_preset": "dream-math", "d2f_block_size": 0}, ["d2f_block_size", "[1, "]),
        ({"d2f_trace": "maybe"}, ["d2f_trace must be 0 or 1"]),
        ({"d2f_trace": 2}, ["d2f_trace must be 0 or 1"]),
    ],
)
def test_refused(client, xargs, expected):
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, **xargs)
    assert all(part in refusal.value.body["message"] for part in expected)


def test_trace(client):
    answer = ask(client, d2f_trace=1)
    trace = answer.kv_transfer_params["d2f"]
    tokens = answer.usage.completion_tokens
    assert len(trace["decided_at"]) == tokens
    assert max(trace["decided_at"]) == trace["forwards"] <= tokens
    assert set(trace["decided_at"]) <= set(range(1, trace["forwards"] + 1))
    assert trace["tokens_per_forward"] == pytest.approx(tokens / trace["forwards"])
    assert ask(client).kv_transfer_params is None
    assert ask(client, d2f_trace=0).kv_transfer_params is None


def test_trace_of_a_chat_that_a_stop_string_ends(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROBLEMS[2].question}],
        temperature=0,
        max_tokens=48,
        stop=["="],
        extra_body={"vllm_xargs": {"d2f_trace": 1}},
    )
    assert answer.choices[0].finish_reason == "stop"
    decided_at = answer.kv_transfer_params["d2f"]["decided_at"]
    assert len(decided_at) >= answer.usage.completion_tokens > 0


@pytest.mark.parametrize(
    "options, message",
    [({"stream": True}, "set stream to false"), ({"n": 2, "temperature": 1.0}, "n = 1")],
)
def test_trace_where_vllm_has_no_place_for_it(client, options, message):
    # To a stream, vLLM says so in its first event.
    with pytest.raises(openai.APIError, match=message):
        list(
            client.completions.create(
                model=MODEL,
                prompt="1 + 1",
                max_tokens=8,
                extra_body={"vllm_xargs": {"d2f_trace": 1}},
                **options,
            )
        )
