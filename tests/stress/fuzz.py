# SPDX-License-Identifier: Apache-2.0
"""Bad input over the whole HTTP surface gets 4xx, and changes no other request.

Three kinds of requests, each with a good one beside it whose answer must not change: `extremes`,
written by hand, which no schema describes; `d2f_options`, drawn by hypothesis, as the server's
schema does not know them; and every operation of the server's /openapi.json, drawn by schemathesis,
valid and invalid.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from stress.faults import COMPLETIONS, PROMPT

from vllm_d2f.hub.names import resolve

TIMEOUT = 120.0
"""Seconds after which a request counts as hanging."""
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16")
OPTIONS += ("--kv-cache-memory-bytes", str(1 << 27))

REFUSED, ANSWERED, EITHER = "4", "2", "24"
"""First digits of the status that a request may get. Never 5xx, never nothing."""
NAN, INF = float("nan"), float("inf")


class Target:
    """A server under test.

    Attributes:
        sent, statuses: requests, and what came.
        wrong: what must not have come.
        changed: good requests beside them that did not get the usual answer.
    """

    def __init__(self, url: str, model: str, headers: dict[str, str] | None = None) -> None:
        self.url, self.model = url, model
        self.client = httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers)
        self.pool = ThreadPoolExecutor(1)
        self.sent = self.changed = 0
        self.statuses: Counter[str] = Counter()
        self.wrong: list[dict[str, str]] = []
        self.answer = self.good()
        config = json.loads((Path(resolve(model)) / "config.json").read_text())
        self.vocabulary, self.mask = config["vocab_size"], config["mask_token_id"]
        served = self.client.get("/v1/models").json()["data"][0]
        self.longest = served["max_model_len"]

    def good(self) -> str:
        body = {"model": self.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 32}
        response = self.client.post(COMPLETIONS, json=body).raise_for_status()
        return response.json()["choices"][0]["text"]

    def send(
        self, name: str, expect: str, body: bytes | dict[str, Any], path: str = COMPLETIONS
    ) -> None:
        """Send a request; a dictionary holds options of an ordinary completion."""
        if isinstance(body, dict):
            # NaN and infinities are written as Python does.
            options = {"model": self.model, "prompt": PROMPT, "max_tokens": 16} | body
            body = json.dumps(options).encode()
        headers = {"Content-Type": "application/json"}
        self.judge(
            name, expect, body, lambda: self.client.post(path, content=body, headers=headers)
        )

    def judge(self, name: str, expect: str, shown: bytes, send: Callable[[], Any]) -> None:
        """Send with the good request beside it, and judge both."""
        beside = self.pool.submit(self.good)
        self.sent += 1
        says, accepted = "", False
        try:
            response = send()
            status, says = str(response.status_code), response.text[:400]
            accepted = expect == EITHER and not_served(response)
        except Exception as error:  # whatever the client's library raises: no answer
            status = type(error).__name__
        self.statuses[status] += 1
        self.changed += 1
        with contextlib.suppress(Exception):
            self.changed -= beside.result(TIMEOUT) == self.answer
        if not accepted and (not status.isdigit() or status[0] not in expect):
            body = shown[:400].decode("utf-8", "replace")
            self.wrong.append({"name": name, "got": status, "body": body, "says": says})

    def as_dict(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "statuses": dict(sorted(self.statuses.items())),
            "wrong": self.wrong[:40],
            "number_wrong": len(self.wrong),
            "good_answers_changed": self.changed,
        }


def not_served(response: Any) -> bool:
    """Return whether a response is vLLM's refusal on a route for models of another kind.

    That and no other 501: the type and the words of the error are compared.
    """
    if response.status_code != 501:
        return False
    error = response.json()["error"]
    words = "The model does not support the structured decision API"
    return error["type"] == "NotImplementedError" and error["message"] == words


def extremes(target: Target) -> Iterator[tuple]:
    """Requests at and beyond the edges of what the API allows, as arguments of `Target.send`."""
    vocabulary, mask, longest = target.vocabulary, target.mask, target.longest
    good = json.dumps({"model": target.model, "prompt": PROMPT, "max_tokens": 16}).encode()

    def named(expect: str, options: dict[str, dict[str, Any]]) -> Iterator[tuple]:
        yield from ((name, expect, body) for name, body in options.items())

    # Prompts
    yield from named(
        ANSWERED,
        {
            "prompt of mask tokens only": {"prompt": [mask] * 40},
            "prompt of one mask token": {"prompt": [mask]},
            "64 prompts": {"prompt": ["1 + 1 ="] * 64, "max_tokens": 4},
            "prompt one short of the model": {"prompt": [5] * (longest - 1), "max_tokens": 1},
            "max_tokens at the limit": {"prompt": [5, 6], "max_tokens": longest - 2},
            "max_tokens 1": {"max_tokens": 1},
            "min_tokens at the limit": {"prompt": [5], "min_tokens": 9, "max_tokens": 9},
            "n 64": {"n": 64, "temperature": 1, "max_tokens": 1},
            "logprobs 20": {"logprobs": 20},
            "long stop string": {"stop": ["x" * 100_000]},
        },
    )
    yield from named(
        REFUSED,
        {
            "prompt of no tokens": {"prompt": []},
            "token out of the vocabulary": {"prompt": [1, vocabulary + 1000]},
            "first token beyond the vocabulary": {"prompt": [vocabulary]},
            "negative token": {"prompt": [-1]},
            "token beyond 64 bits": {"prompt": [1 << 70]},
            "token of a fraction": {"prompt": [1.5]},
            "prompts mixed": {"prompt": ["a", [1]]},
            "prompt as long as the model": {"prompt": [5] * longest},
            "prompt of a million tokens": {"prompt": [5] * 1_000_000},
            "max_tokens beyond the model": {"prompt": [5, 6], "max_tokens": longest + 1},
            "min_tokens above max_tokens": {"min_tokens": 20},
            "n 17000": {"n": 17_000, "temperature": 1, "max_tokens": 1},
            "unknown model": {"model": "no" * 500},
            "allowed token -1": {"allowed_token_ids": [-1]},
            "no allowed tokens": {"allowed_token_ids": []},
            "logit_bias out of the vocabulary": {"logit_bias": {str(vocabulary + 5): 1}},
            "logit_bias of a negative token": {"logit_bias": {"-1": 1}},
            "logit_bias no token": {"logit_bias": {"pen": 1}},
            "logit_bias beyond 64 bits": {"logit_bias": {str(1 << 70): 1}},
            "broken regex": {"structured_outputs": {"regex": "("}},
            "broken grammar": {"structured_outputs": {"grammar": "root ::= ((("}},
            "empty choice": {"structured_outputs": {"choice": []}},
            "two structures": {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "schema that refers to itself": {"structured_outputs": {"json": {"$ref": "#"}}},
            "json schema of a number": {"structured_outputs": {"json": 3}},
            "stream_options alone": {"stream_options": {"include_usage": True}},
        },
    )
    yield from named(
        EITHER,
        {
            "empty prompt": {"prompt": ""},
            "token true": {"prompt": [True]},
            "unicode": {"prompt": "\u202e\u0000\ufffe\U0001f469\u200d\U0001f4bb\u0301" * 5},
            "nul bytes": {"prompt": "\x00" * 50},
            # vLLM cuts an answer that would not fit, unless it alone is longer than the model.
            "max_tokens beyond the limit": {"prompt": [5, 6], "max_tokens": longest - 1},
            "stop token -5": {"stop_token_ids": [-5]},
            "stop token beyond, min_tokens": {"stop_token_ids": [vocabulary + 5], "min_tokens": 4},
            "10,000 stop tokens": {"stop_token_ids": list(range(10_000))},
            "10,000 stop strings": {"stop": [f"stop {i}" for i in range(10_000)]},
            "empty stop string": {"stop": [""]},
            "10,000 bad words": {"bad_words": [f"bad{i}" for i in range(10_000)]},
            "bad words": {"bad_words": ["", " ", "\u0000"]},
            "best_of": {"best_of": 1 << 40},
            "logprobs 1000": {"logprobs": 1000},
            "beam search": {"use_beam_search": True, "n": 4},
            "huge logit_bias": {"logit_bias": {str(i): 1.0 for i in range(100_000)}},
            "empty grammar": {"structured_outputs": {"grammar": "root ::= "}},
            "endless regex": {"structured_outputs": {"regex": "(a*)*b" * 40}},
            "cache salt": {"cache_salt": ""},
            "kv_transfer_params": {"kv_transfer_params": {"a": [1, {"b": None}]}},
            "10,000 xargs": {"vllm_xargs": {f"x{i}": i for i in range(10_000)}},
        },
    )

    # Bytes that are no JSON, or none that a schema draws
    nested = b'{"a":' * 2000 + b"1" + b"}" * 2000
    for name, body in {
        "no body": b"",
        "no JSON": b"{",
        "a number": b"1e400",
        "lone surrogate": good.replace(b"Leo has", b"\\ud800 has"),
        "invalid UTF-8": good.replace(b"Leo", b"\xff\xfe"),
        "truncated UTF-8": good[:-1] + b"\xe2\x82",
        "deep nesting": b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "same key twice": good[:-1] + b',"max_tokens":-1}',
        **{
            f"deep {name}": good[:-1] + b',"' + name.encode() + b'":' + nested + b"}"
            for name in ("vllm_xargs", "logit_bias", "structured_outputs", "response_format")
        },
    }.items():
        yield name, REFUSED, body
    chat = {"model": target.model, "messages": [{"role": "user", "content": "\ud800"}]}
    yield "lone surrogate, chat", REFUSED, json.dumps(chat).encode(), "/v1/chat/completions"

    # Numbers that JSON schemas do not draw; wrong types are schemathesis' part
    for value in (NAN, INF, -INF, -1, 1 << 70):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            fine = name == "repetition_penalty" and value == 1 << 70
            yield f"{name} {value}", EITHER if fine else REFUSED, {name: value}
        for name in ("presence_penalty", "frequency_penalty"):
            yield f"{name} {value}", EITHER if value == -1 else REFUSED, {name: value}
    for value in (0, -1, 1.5, 1 << 40, 1 << 70, NAN, INF):
        for name in (
            *("max_tokens", "n", "min_tokens", "logprobs", "prompt_logprobs", "top_k", "seed"),
            *("truncate_prompt_tokens", "priority"),
        ):
            yield f"{name} {value}", EITHER, {name: value, "temperature": 0.5}
    for value in (1 << 63, -(1 << 63) - 1, 1 << 64):
        yield f"seed {value}", REFUSED, {"seed": value, "temperature": 0.5}
    for value in (1 << 31, 1 << 63, 1 << 70):
        yield f"stop token {value}", EITHER, {"stop_token_ids": [value]}
        yield f"allowed token {value}", REFUSED, {"allowed_token_ids": [value]}
        logprobs = {"logprobs": 1, "logprob_token_ids": [value]}
        yield f"logprob_token_ids {value}", REFUSED, logprobs
    for value in (NAN, -INF, 1e308):  # vLLM brings every bias into [-100, 100]
        yield f"logit_bias {value}", EITHER, {"logit_bias": {"5": value}}

    # D2F's own
    for expect, options in (
        (ANSWERED, {"tau_add": 0, "tau_act": 0, "tau_conf": 0}),
        (ANSWERED, {"tau_add": 1, "tau_act": 1, "tau_conf": 1}),
        (ANSWERED, {"block_size": 64, "max_blocks": 1}),
        (ANSWERED, {"block_size": 1}),
        (ANSWERED, {"block_size": 1, "max_blocks": 64}),
        (REFUSED, {"block_size": "9" * 5000}),
        (EITHER, {"block_size": "\u0661"}),
        (REFUSED, {"preset": "x" * 10_000}),
        (REFUSED, {"preset": ["gsm8k"]}),
        (REFUSED, {"x" * 10_000: 1}),
        *(
            (EITHER if (name, value) == ("max_blocks", "1_0") else REFUSED, {name: value})
            for value in (NAN, INF, 1 << 70, -1, "", "nan", "inf", "1_0", "0x1")
            for name in ("tau_add", "tau_act", "tau_conf", "block_size", "max_blocks", "trace")
        ),
    ):
        xargs = {f"d2f_{name}": value for name, value in options.items()}
        yield f"{xargs}"[:80], expect, {"vllm_xargs": xargs}


def d2f_options() -> st.SearchStrategy[dict[str, Any]]:
    """Make values of `vllm_xargs`: D2F's names and others, with numbers, texts and nonsense."""
    names = [f"d2f_{n}" for n in ("block_size", "max_blocks", "tau_add", "tau_act", "tau_conf")]
    names += ["d2f_preset", "d2f_trace", "d2f_", "d2f_window", "diffusion_steps", "other"]
    integers = st.integers(-(1 << 70), 1 << 70) | st.integers(-2, 200)
    numbers = integers | st.floats(0, 1) | st.floats(allow_nan=True, allow_infinity=True)
    texts = st.text(max_size=20) | numbers.map(str) | st.sampled_from(["gsm8k", "1", "0"])
    values = numbers | texts | st.lists(numbers | texts, max_size=3) | st.none() | st.booleans()
    return st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=4)


def send_d2f_options(target: Target, count: int, seed: int) -> None:
    """Drawn `vllm_xargs`: refused, or answered because every value is in range."""
    for xargs in drawn(d2f_options(), count, seed):
        target.send("drawn xargs", EITHER, {"vllm_xargs": xargs})


def send_operations(target: Target, count: int, seed: int) -> None:
    """`count` valid and as many invalid requests for each operation of the server's schema."""
    schema = schemathesis.openapi.from_dict(target.client.get("/openapi.json").json())
    schema.config.update(base_url=target.url)
    headers = {k: v for k, v in target.client.headers.items() if k == "authorization"}
    for found in schema.get_all_operations():
        operation: Any = found.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            name = f"{operation.method.upper()} {operation.path} {mode.value}"
            for case in drawn(operation.as_strategy(generation_mode=mode), count, seed):
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = target.model  # else all end there
                shown = repr(case.body).encode("utf-8", "replace")
                call = lambda: case.call(timeout=TIMEOUT, headers=headers)  # noqa: B023, E731
                target.judge(name, EITHER, shown, call)


def drawn(strategy: st.SearchStrategy, count: int, seed: int) -> list[Any]:
    """`count` values of a strategy; none of one that has no values."""
    found: list[Any] = []

    @with_seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no invalid ones
        collect()
    return found
