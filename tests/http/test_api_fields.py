# SPDX-License-Identifier: Apache-2.0
"""What else vLLM's server takes: every field and endpoint is honoured or refused, none is a 500.

Fields that vLLM itself does not know, and ignores for every model, are not listed here.
"""

import json
import math

import httpx
import pytest
from http_server import MODEL

from vllm_d2f.demo import bundled_problems

QUESTION = bundled_problems()[0].question
ANSWER = bundled_problems()[0].answer.strip()
PROMPT_OF = {
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 48},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_completion_tokens": 48,
    },
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 48},
    "/v1/messages": {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48},
}
COMPLETIONS, CHAT, RESPONSES, MESSAGES = PROMPT_OF
ENDPOINTS = pytest.mark.parametrize("endpoint", PROMPT_OF)
OPENAI = pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT, RESPONSES])


@pytest.fixture(scope="module")
def post(server):
    with httpx.Client(base_url=server.url, timeout=120) as http:

        def post(endpoint: str, **fields) -> httpx.Response:
            body = {"model": MODEL} | PROMPT_OF.get(endpoint, {}) | fields
            return http.post(endpoint, json=body)

        yield post


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if "output" in body:
        return body["output"][0]["content"][0]["text"]
    if "content" in body:
        return body["content"][0]["text"]
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def refused(answer: httpx.Response, *parts: str) -> None:
    assert answer.status_code == 400, answer.text
    for part in parts:
        assert part in answer.text


@ENDPOINTS
def test_every_text_endpoint_answers(post, endpoint):
    assert text_of(post(endpoint)) == ANSWER


def test_responses_and_messages_stream_the_same(server):
    """Joined pieces are the answer, and there are events of the end."""
    for endpoint, kind in ((RESPONSES, "response.output_text.delta"), (MESSAGES, None)):
        body = {"model": MODEL, "stream": True} | PROMPT_OF[endpoint]
        pieces, last = [], {}
        with httpx.stream("POST", f"{server.url}{endpoint}", json=body, timeout=120) as lines:
            for line in lines.iter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line.removeprefix("data: "))
                    delta = last.get("delta")
                    if kind is not None and last["type"] == kind:
                        pieces.append(delta)
                    elif kind is None and last["type"] == "content_block_delta":
                        pieces.append(delta["text"])
        assert "".join(pieces) == ANSWER
        assert last["type"] in ("response.completed", "message_stop")


# Options of D2F beside the other fields


@OPENAI
def test_options_may_stand_beside_the_other_fields(post, endpoint):
    answer = post(endpoint, d2f_trace=1, d2f_block_size=4, d2f_tau_conf=1.0, d2f_max_blocks=1)
    assert text_of(answer) == ANSWER
    nested = {"d2f_trace": 1, "d2f_block_size": 4, "d2f_tau_conf": 1.0, "d2f_max_blocks": 1}
    same = post(endpoint, vllm_xargs=nested).json()["kv_transfer_params"]["d2f"]
    trace = answer.json()["kv_transfer_params"]["d2f"]
    assert trace == same and trace["forwards"] > len(trace["decided_at"]) / 2
    preset = post(endpoint, d2f_trace=1, d2f_preset="humaneval").json()
    assert preset["kv_transfer_params"]["d2f"]["forwards"] < trace["forwards"]


@OPENAI
def test_wrong_options_beside_the_other_fields_are_refused(post, endpoint):
    refused(post(endpoint, d2f_tau_conf=7), "d2f_tau_conf must be a number in [0, 1]")
    refused(post(endpoint, d2f_speed=7), "unknown option 'd2f_speed'", "d2f_tau_conf")
    refused(post(endpoint, d2f_tau_conf=0.5, vllm_xargs={"d2f_tau_conf": 0.5}), "remove one")
    refused(post(endpoint, vllm_xargs={"tau_conf": 0.5}), "unknown option 'tau_conf'")


@pytest.mark.parametrize(
    "field", ["guided_json", "guided_regex", "guided_choice", "guided_grammar"]
)
@OPENAI
def test_removed_fields_name_their_successor(post, endpoint, field):
    refused(post(endpoint, **{field: "[0-9]"}), f"{field} is not supported", "structured_outputs")


# Refused

REFUSED = {
    "watermarking": (dict(watermarking=True), ["watermarking: not supported"]),
    "kv_transfer_params": (dict(kv_transfer_params={"a": 1}), ["no connector"]),
    "ec_transfer_params": (dict(ec_transfer_params={"a": 1}), ["no connector"]),
    "trace in a list": (dict(vllm_xargs={"d2f_trace": [1]}), ["d2f_trace must be 0 or 1"]),
}


@pytest.mark.parametrize("name", REFUSED)
@OPENAI
def test_refused_everywhere(post, endpoint, name):
    fields, parts = REFUSED[name]
    refused(post(endpoint, **fields), *parts)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (dict(prompt_embeds="AAAA"), "--enable-prompt-embeds"),
        (dict(suffix="x"), "suffix"),
        (dict(prompt=[10**9]), "out of vocabulary"),
        (dict(prompt=[]), "prompt"),
        (dict(truncate_prompt_tokens=100_000), "512"),
        (dict(logprob_token_ids=[20]), "logprobs"),
        (dict(response_format={"type": "json_schema"}), "json_schema"),
        (dict(stream_options={"include_usage": True}), "stream=True"),
    ],
)
def test_refused_completions(post, fields, part):
    refused(post(COMPLETIONS, **fields), part)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (dict(echo=True), "in a chat always"),
        (dict(top_logprobs=2), "logprobs"),
        (dict(thinking_token_budget=4), "thinking_token_budget"),
        (dict(tool_choice="auto"), "tools"),
        (dict(messages=[]), "message"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {
                "url": "data:image/png;base64,AAAA"}}]}]),
            "not a multimodal model",
        ),
    ],
)  # fmt: skip
def test_refused_chats(post, fields, part):
    refused(post(CHAT, **fields), part)


# Honoured


@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT])
def test_fields_that_decide_no_token(post, endpoint):
    fields = {"user": "somebody", "cache_salt": "mine", "priority": 0, "unknown_to_all": 1}
    for _ in range(2):  # the second time from pages found under that salt
        assert text_of(post(endpoint, **fields)) == ANSWER


def test_several_prompts_and_token_ids(post):
    ids = post("/tokenize", prompt=QUESTION).json()["tokens"]
    other = bundled_problems()[1]
    choices = post(COMPLETIONS, prompt=[QUESTION, other.question]).json()["choices"]
    assert [choice["text"] for choice in choices] == [ANSWER, other.answer.strip()]
    assert text_of(post(COMPLETIONS, prompt=ids)) == ANSWER
    choices = post(COMPLETIONS, prompt=[ids, ids[:-1]]).json()["choices"]
    assert choices[0]["text"] == ANSWER


def test_token_ids_come_back(post):
    answer = post(COMPLETIONS, return_token_ids=True).json()
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == post("/tokenize", prompt=QUESTION).json()["tokens"]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    text = post("/detokenize", tokens=choice["token_ids"]).json()["prompt"]
    assert text.startswith(ANSWER)
    named = post(COMPLETIONS, logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]
    assert named["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_prompts_are_cut_as_asked(post):
    """The last tokens of a long prompt, or the first."""
    ids = post("/tokenize", prompt=QUESTION).json()["tokens"]
    for side, kept in (("left", ids[-9:]), ("right", ids[:9])):
        fields = dict(truncate_prompt_tokens=9, truncation_side=side, return_token_ids=True)
        choice = post(COMPLETIONS, **fields).json()["choices"][0]
        assert choice["prompt_token_ids"] == kept


def test_special_tokens_are_shown_when_asked(post):
    fields = dict(skip_special_tokens=False, ignore_eos=True, max_tokens=40)
    assert "<|" in text_of(post(COMPLETIONS, **fields))
    assert "<|" not in text_of(post(COMPLETIONS, **fields | dict(skip_special_tokens=True)))


def test_a_chat_goes_on_with_its_last_message(post):
    head = ANSWER[:5]
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": head},
    ]
    fields = dict(continue_final_message=True, add_generation_prompt=False)
    assert head + text_of(post(CHAT, messages=messages, **fields)) == ANSWER


def test_chats_in_one_request(post):
    messages = [{"role": "user", "content": problem.question} for problem in bundled_problems()[:2]]
    answer = post(
        "/v1/chat/completions/batch", messages=[[one] for one in messages], max_tokens=48
    ).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [problem.answer.strip() for problem in bundled_problems()[:2]]


def test_stream_interval_holds_pieces_back(server):
    def pieces(**fields) -> list[str]:
        body = {"model": MODEL, "prompt": QUESTION, "max_tokens": 48, "stream": True}
        body |= {"d2f_block_size": 4, "d2f_tau_conf": 1.0, "d2f_max_blocks": 1} | fields
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=120) as lines:
            data = [x.removeprefix("data: ") for x in lines.iter_lines() if x.startswith("data: {")]
        return [json.loads(line)["choices"][0]["text"] for line in data]

    every, few = pieces(), pieces(stream_interval=8)
    assert "".join(every) == "".join(few) == ANSWER
    assert len(few) < len(every)


def test_scores_of_the_next_token_are_its_logprobs(post):
    """`/generative_scoring` reads the answer's first position, as `logprobs` of one token does."""
    ids = post("/tokenize", prompt=QUESTION).json()["tokens"]
    labels = [post("/tokenize", prompt=digit).json()["tokens"][0] for digit in "789"]
    fields = dict(logprob_token_ids=labels, return_tokens_as_token_ids=True)
    choice = post(COMPLETIONS, max_tokens=1, logprobs=3, **fields).json()["choices"][0]
    wanted = choice["logprobs"]["top_logprobs"][0][f"token_id:{labels[0]}"]
    halves = dict(query=ids[:-1], items=[ids[-1:]], label_token_ids=labels, apply_softmax=False)
    (result,) = post("/generative_scoring", **halves).json()["data"]
    assert math.log(result["score"]) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("path", ["/v1/messages", "/generative_scoring"])
def test_endpoints_that_know_nothing_of_d2f_obey_its_rules(post, path):
    """Options reach the engine, or are refused as everywhere (tests/test_request_fields.py)."""
    messages = [{"role": "user", "content": QUESTION}]
    fields = dict(messages=messages, max_tokens=32)
    if path == "/generative_scoring":
        fields = dict(query=QUESTION, items=["73"], label_token_ids=[26, 22])
    assert post(path, **fields, d2f_block_size=8).status_code == 200
    refused(post(path, **fields, d2f_block_size=0), "d2f_block_size must be an integer in [1, ")
    refused(post(path, **fields, d2f_speed=1), "unknown option 'd2f_speed'")
    refused(post(path, **fields, vllm_xargs={"d2f_speed": 1}), "unknown option 'd2f_speed'")
    refused(post(path, **fields, guided_json={"type": "object"}), "use structured_outputs")


# Grammars


def test_a_grammar_without_a_way_out_hurts_nobody_else(post):
    """One that cannot go on is refused, wherever; one that only never ends is cut."""
    refused(post(COMPLETIONS, structured_outputs={"grammar": "root ::= root"}), "no text matches")
    refused(post(COMPLETIONS, structured_outputs={"json": {"$ref": "#"}}), "no text matches")
    lost = {"grammar": 'root ::= "7" more\nmore ::= more'}
    refused(post(COMPLETIONS, structured_outputs=lost), "no text matches `more`")
    endless = {"grammar": 'root ::= "7" more\nmore ::= "x" more'}
    answer = post(COMPLETIONS, structured_outputs=endless, max_tokens=20).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert text_of(post(COMPLETIONS)) == ANSWER
    assert len(text_of(post(COMPLETIONS, structured_outputs={"regex": "[0-9]{3}"}))) == 3
