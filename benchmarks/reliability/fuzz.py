# SPDX-License-Identifier: Apache-2.0
"""Bad input over the whole HTTP surface: nothing but 4xx, and nobody else notices.

    python -m benchmarks.reliability.fuzz --json benchmarks/results/reliability_fuzz.json
    python -m benchmarks.reliability.fuzz --model ar-tiny   # what stock vLLM does by itself

Three kinds of requests, each with a good one beside it whose answer must not change:
`extremes`, written by hand; `xargs`, D2F's own options drawn by hypothesis; `schema`, every
operation of the server's /openapi.json drawn by schemathesis, valid and invalid.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.server import serve

# For the server: on a busy machine more threads than cores only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROMPT = "Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?"
TIMEOUT = 120.0
"""Seconds after which a request counts as hanging."""

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
OPTIONS += ["--kv-cache-memory-bytes", str(1 << 27)]

AUTH = {"authorization"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

REFUSED, ANSWERED, EITHER = "4xx", "2xx", "2xx or 4xx"
"""What a request must get. Never 5xx, never nothing."""


def not_served(response: Any) -> bool:
    """Whether it is vLLM's answer on a route of its own for models of another kind.

    That and no other 501: the type and the words of the error are compared.
    """
    if response is None or response.status_code != 501:
        return False
    error = response.json()["error"]
    words = "The model does not support the structured decision API"
    return error["type"] == "NotImplementedError" and error["message"] == words


@dataclass(frozen=True)
class Ask:
    """One request: its path, its body as bytes, and what it must get."""

    name: str
    path: str
    body: bytes
    expect: str = REFUSED


@dataclass
class Outcome:
    """What a run met."""

    sent: int = 0
    statuses: Counter = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    good_beside: int = 0
    good_changed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "statuses": dict(sorted(self.statuses.items())),
            "wrong": self.wrong[:40],
            "number_wrong": len(self.wrong),
            "good_requests_beside": self.good_beside,
            "good_answers_changed": self.good_changed,
        }


class Target:
    """A server under test and the answer of the good request."""

    def __init__(self, url: str, model: str, headers: dict[str, str] | None = None) -> None:
        self.url, self.model = url, model
        self.client = httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers)
        self.pool = ThreadPoolExecutor(1)
        self.answer = self.good()

    def good(self) -> str:
        body = {"model": self.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 32}
        response = self.client.post(COMPLETIONS, json=body)
        response.raise_for_status()
        return response.json()["choices"][0]["text"]

    def send(self, ask: Ask, outcome: Outcome) -> httpx.Response | None:
        """Send it with the good one beside it, and judge both."""
        return self.judge(
            ask.name,
            ask.expect,
            ask.body,
            lambda: self.client.post(
                ask.path, content=ask.body, headers={"Content-Type": "application/json"}
            ),
            outcome,
        )

    def judge(
        self,
        name: str,
        expect: str,
        shown: bytes,
        send: Callable[[], Any],
        outcome: Outcome,
    ) -> Any:
        beside = self.pool.submit(self.good)
        outcome.sent += 1
        try:
            response = send()
            status = str(response.status_code)
        except Exception as error:  # whatever the client's library raises: no answer
            response, status = None, type(error).__name__
        outcome.statuses[status] += 1
        outcome.good_beside += 1
        with contextlib.suppress(Exception):
            if beside.result(TIMEOUT) == self.answer:
                outcome.good_changed -= 1
        outcome.good_changed += 1
        allowed = {"4xx": "4", "2xx": "2", EITHER: "24"}[expect]
        wrong = status[0] not in allowed or not status.isdigit()
        if wrong and not (expect == EITHER and not_served(response)):
            text = response.text if response is not None else ""
            outcome.wrong.append(
                {
                    "name": name,
                    "expected": expect,
                    "got": status,
                    "body": shown[:400].decode("utf-8", "replace"),
                    "says": text[:400],
                }
            )
        return response


def body_of(model: str, **options: Any) -> bytes:
    """A completion request with these options; NaN and infinities are written as Python does."""
    return json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 16} | options).encode()


def extremes(model: str, vocabulary: int, mask: int, longest: int) -> Iterator[Ask]:
    """Requests at and beyond the edges of what the API allows.

    Args:
        vocabulary: tokens of the model; `mask` is its mask token, `longest` its longest sequence.
    """
    d2f = model.startswith("d2f")

    value: Any
    one: Callable[..., Ask] = lambda name, expect=REFUSED, **options: Ask(  # noqa: E731
        name, COMPLETIONS, body_of(model, **options), expect
    )

    def raw(name: str, body: bytes, path: str = COMPLETIONS, expect: str = REFUSED) -> Ask:
        return Ask(name, path, body, expect)

    def xargs(title: str, expect: str = REFUSED, **options: Any) -> Ask:
        values = {f"d2f_{key}": value for key, value in options.items()}
        return one(title, expect if d2f else EITHER, vllm_xargs=values)

    # Prompts
    yield one("empty prompt", EITHER, prompt="")
    yield one("prompt of no tokens", prompt=[])
    yield one("prompt of mask tokens only", ANSWERED, prompt=[mask] * 40)
    yield one("prompt of one mask token", ANSWERED, prompt=[mask])
    yield one("token out of the vocabulary", prompt=[1, vocabulary + 1000])
    yield one("first token beyond the vocabulary", prompt=[vocabulary])
    yield one("negative token", prompt=[-1])
    yield one("token beyond 64 bits", prompt=[1 << 70])
    yield one("token of a fraction", prompt=[1.5])
    yield one("token true", EITHER, prompt=[True])
    yield one("prompts mixed", prompt=["a", [1]])
    yield one("prompt of objects", prompt=[{}])
    yield one("prompt null", prompt=None)
    yield one("prompt a number", prompt=7)
    yield one("64 prompts", ANSWERED, prompt=["1 + 1 ="] * 64, max_tokens=4)
    yield one("prompt as long as the model", prompt=[5] * longest)
    yield one("prompt one short of the model", ANSWERED, prompt=[5] * (longest - 1), max_tokens=1)
    yield one("prompt of a million tokens", prompt=[5] * 1_000_000)
    yield one("unicode", EITHER, prompt="\u202e\u0000\ufffe\U0001f469\u200d\U0001f4bb\u0301" * 5)
    yield one("nul bytes", EITHER, prompt="\x00" * 50)
    yield raw("lone surrogate", body_of(model).replace(b"Leo has", b"\\ud800 has"))
    yield raw("lone surrogate, chat", chat(model, "\ud800"), CHAT)
    yield raw("invalid UTF-8", body_of(model).replace(b"Leo", b"\xff\xfe"))
    yield raw("truncated UTF-8", body_of(model)[:-1] + b"\xe2\x82")

    # Bodies
    yield raw("no body", b"")
    yield raw("no JSON", b"{")
    yield raw("an array", b"[]")
    yield raw("null", b"null")
    yield raw("a number", b"1e400")
    yield raw("deep nesting", b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    nested = b'{"a":' * 2000 + b"1" + b"}" * 2000
    for name in ("vllm_xargs", "logit_bias", "structured_outputs", "response_format"):
        text = f'{{"model":"{model}","prompt":"a","{name}":{nested.decode()}}}'
        yield raw(f"deep {name}", text.encode())
    yield raw("same key twice", body_of(model)[:-1] + b',"max_tokens":-1}')
    yield raw("unknown model", body_of("no" * 500))
    yield one("unknown field", EITHER, nonsense={"a": [1, None]})

    # Numbers
    for value in (float("nan"), float("inf"), float("-inf"), 1e400, -1, "x", None, [], {}, 1 << 70):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            fine = value is None or (name == "repetition_penalty" and value == 1 << 70)
            yield one(f"{name} {value}", EITHER if fine else REFUSED, **{name: value})
        for name in ("presence_penalty", "frequency_penalty"):
            fine = value in (None, -1)
            yield one(f"{name} {value}", EITHER if fine else REFUSED, **{name: value})
    for value in (0, -1, 1.5, 1 << 40, 1 << 70, float("nan"), float("inf"), "many", [], {}):
        for name in ("max_tokens", "n", "min_tokens", "logprobs", "prompt_logprobs", "top_k"):
            yield one(f"{name} {value}", EITHER, **{name: value}, temperature=0.5)
        yield one(f"seed {value}", EITHER, seed=value, temperature=0.5)
        yield one(f"truncate_prompt_tokens {value}", EITHER, truncate_prompt_tokens=value)
        yield one(f"priority {value}", EITHER, priority=value)
    for value in (1 << 63, -(1 << 63) - 1, 1 << 64):
        yield one(f"seed {value}", seed=value, temperature=0.5)
    for value in (1 << 31, 1 << 63, 1 << 70):
        yield one(f"stop token {value}", EITHER, stop_token_ids=[value])
        yield one(f"allowed token {value}", allowed_token_ids=[value])
        yield one(f"logprob_token_ids {value}", logprobs=1, logprob_token_ids=[value])
    yield one("stop token -5", EITHER, stop_token_ids=[-5])
    beyond: dict[str, Any] = dict(stop_token_ids=[vocabulary + 5], min_tokens=4)
    yield one("stop token beyond the vocabulary, min_tokens", EITHER, **beyond)
    yield one("allowed token -1", allowed_token_ids=[-1])
    yield one("no allowed tokens", allowed_token_ids=[])
    yield one("10,000 stop tokens", EITHER, stop_token_ids=list(range(10_000)))
    yield one("max_tokens 1", ANSWERED, max_tokens=1)
    yield one("max_tokens at the limit", ANSWERED, prompt=[5, 6], max_tokens=longest - 2)
    # vLLM cuts an answer that would not fit, unless it alone is longer than the model.
    yield one("max_tokens beyond the limit", EITHER, prompt=[5, 6], max_tokens=longest - 1)
    yield one("max_tokens beyond the model", prompt=[5, 6], max_tokens=longest + 1)
    yield one("min_tokens at the limit", ANSWERED, prompt=[5], min_tokens=9, max_tokens=9)
    yield one("min_tokens above max_tokens", min_tokens=20)
    yield one("n 17000", n=17_000, temperature=1, max_tokens=1)
    yield one("n 64", ANSWERED, n=64, temperature=1, max_tokens=1)
    yield one("best_of", EITHER, best_of=1 << 40)
    yield one("logprobs 1000", EITHER, logprobs=1000)
    yield one("logprobs 20", ANSWERED, logprobs=20)
    yield one("beam search", EITHER, use_beam_search=True, n=4)

    # Strings and maps
    yield one("10,000 stop strings", EITHER, stop=[f"stop {i}" for i in range(10_000)])
    yield one("empty stop string", EITHER, stop=[""])
    yield one("long stop string", ANSWERED, stop=["x" * 100_000])
    yield one("stop of numbers", stop=[1, 2])
    yield one("huge logit_bias", EITHER, logit_bias={str(i): 1.0 for i in range(100_000)})
    yield one("logit_bias out of the vocabulary", logit_bias={str(vocabulary + 5): 1})
    yield one("logit_bias of a negative token", logit_bias={"-1": 1})
    yield one("logit_bias no token", logit_bias={"pen": 1})
    yield one("logit_bias beyond 64 bits", logit_bias={str(1 << 70): 1})
    # vLLM brings every bias into [-100, 100].
    for value in (float("nan"), float("-inf"), 1e308):
        yield one(f"logit_bias {value}", EITHER, logit_bias={"5": value})
    yield one("bad words", EITHER, bad_words=["", " ", "\u0000"])
    yield one("10,000 bad words", EITHER, bad_words=[f"bad{i}" for i in range(10_000)])
    yield one("broken regex", structured_outputs={"regex": "("})
    yield one("empty grammar", EITHER, structured_outputs={"grammar": "root ::= "})
    yield one("broken grammar", structured_outputs={"grammar": "root ::= ((("})
    yield one("empty choice", structured_outputs={"choice": []})
    yield one("two structures", structured_outputs={"regex": "a", "choice": ["b"]})
    yield one("endless regex", EITHER, structured_outputs={"regex": "(a*)*b" * 40})
    yield one("schema that refers to itself", REFUSED, structured_outputs={"json": {"$ref": "#"}})
    yield one("json schema of a number", structured_outputs={"json": 3})
    yield one("stream_options alone", stream_options={"include_usage": True})
    yield one("cache salt", EITHER, cache_salt="")
    yield one("kv_transfer_params", EITHER, kv_transfer_params={"a": [1, {"b": None}]})

    # D2F's own
    yield xargs("thresholds 0", ANSWERED, tau_add=0, tau_act=0, tau_conf=0)
    yield xargs("thresholds 1", ANSWERED, tau_add=1, tau_act=1, tau_conf=1)
    yield xargs("block larger than max_tokens", ANSWERED, block_size=64, max_blocks=1)
    yield xargs("block of one", ANSWERED, block_size=1)
    yield xargs("as many blocks of one as fit", ANSWERED, block_size=1, max_blocks=64)
    for value in (float("nan"), float("inf"), 1e400, 1 << 70, -1, "", "nan", "inf", "1_0", "0x1"):
        for name in ("tau_add", "tau_act", "tau_conf", "block_size", "max_blocks", "trace"):
            fine = name == "max_blocks" and value == "1_0"
            yield xargs(f"{name} {value!r}", EITHER if fine else REFUSED, **{name: value})
    yield xargs("block size of 5000 digits", block_size="9" * 5000)
    yield xargs("block size of Arabic digits", EITHER, block_size="\u0661")
    yield xargs("preset unknown", preset="x" * 10_000)
    yield xargs("preset a list", preset=["gsm8k"])
    yield one("option unknown", REFUSED if d2f else EITHER, vllm_xargs={"d2f_" + "x" * 10_000: 1})
    yield one("xargs a list", vllm_xargs=[1])
    yield one("xargs a string", vllm_xargs="d2f_tau_conf")
    yield one("10,000 xargs", EITHER, vllm_xargs={f"x{i}": i for i in range(10_000)})


def chat(model: str, text: str, **options: Any) -> bytes:
    """A chat request."""
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": 16} | options).encode()


def drawn_xargs(count: int, seed: int) -> Iterable[dict[str, Any]]:
    """Values of `vllm_xargs`: D2F's names and others, with numbers, texts and nonsense."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed
    from hypothesis import strategies as st

    names = [f"d2f_{n}" for n in ("block_size", "max_blocks", "tau_add", "tau_act", "tau_conf")]
    names += ["d2f_preset", "d2f_trace", "d2f_", "d2f_window", "diffusion_steps", "other"]
    numbers = st.one_of(
        st.integers(-(1 << 70), 1 << 70),
        st.integers(-2, 200),
        st.floats(0, 1),
        st.floats(allow_nan=True, allow_infinity=True),
    )
    texts = st.one_of(st.text(max_size=20), numbers.map(str), st.sampled_from(["gsm8k", "1", "0"]))
    lists = st.lists(st.one_of(numbers, texts), max_size=3)
    values = st.one_of(numbers, texts, lists, st.none(), st.booleans())
    found: list[dict[str, Any]] = []

    @with_seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=4))
    def collect(xargs: dict[str, Any]) -> None:
        found.append(xargs)

    collect()
    return found


def fuzz_extremes(target: Target, count: int, seed: int) -> Outcome:
    """Every request of `extremes`."""
    outcome = Outcome()
    ids = token_ids(target)
    for ask in extremes(target.model, *ids):
        target.send(ask, outcome)
    return outcome


def fuzz_xargs(target: Target, count: int, seed: int) -> Outcome:
    """Drawn `vllm_xargs`: refused, or answered because every value is in range."""
    outcome = Outcome()
    for xargs in drawn_xargs(count, seed):
        body = body_of(target.model, vllm_xargs=xargs)
        target.send(Ask("drawn xargs", COMPLETIONS, body, EITHER), outcome)
    return outcome


def fuzz_schema(target: Target, count: int, seed: int) -> Outcome:
    """`count` requests of each kind for each operation of the server's own description."""
    import schemathesis

    schema = schemathesis.openapi.from_dict(target.client.get("/openapi.json").json())
    schema.config.update(base_url=target.url)
    outcome = Outcome()
    for found in schema.get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            operation: Any = found.ok()  # type: ignore[union-attr]
            fuzz_operation(target, operation, mode, count, seed, outcome)
    return outcome


def fuzz_operation(
    target: Target, operation: Any, mode: Any, count: int, seed: int, outcome: Outcome
) -> None:
    """Requests of one operation that fit its schema, or that do not, by `mode`."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed
    from hypothesis.errors import Unsatisfiable

    name = f"{operation.method.upper()} {operation.path} {mode.value}"

    @with_seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = target.model  # else all end there
        shown = repr(case.body).encode("utf-8", "replace")
        headers = dict(target.client.headers)
        target.judge(
            name,
            EITHER,
            shown,
            lambda: case.call(timeout=TIMEOUT, headers={k: headers[k] for k in AUTH & {*headers}}),
            outcome,
        )

    # Of an operation without parameters there is no invalid request.
    with contextlib.suppress(Unsatisfiable):
        send()


def token_ids(target: Target) -> tuple[int, int, int]:
    """Tokens in the vocabulary, the mask token (0 without one), the longest sequence."""
    from vllm_d2f.hub.names import resolve

    config = json.loads((Path(resolve(target.model)) / "config.json").read_text())
    model = target.client.get("/v1/models").json()["data"][0]
    return config["vocab_size"], config.get("mask_token_id") or 0, model["max_model_len"]


KINDS = {"extremes": fuzz_extremes, "xargs": fuzz_xargs, "schema": fuzz_schema}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="d2f-tiny")
    parser.add_argument("--base-url", help="a server that runs already, instead of a new one")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=200, help="drawn requests of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {
        "model": args.model,
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
    }
    if args.json and args.json.exists():
        results = json.loads(args.json.read_text())
    with serve(args.model, OPTIONS, args.base_url, 600) as url:
        target = Target(url, args.model)
        for kind in args.only:
            started = time.monotonic()
            outcome = KINDS[kind](target, args.count, args.seed)
            results[kind] = outcome.as_dict() | {"count": args.count, "seed": args.seed}
            results[kind]["alive_after"] = target.good() == target.answer
            results[kind]["seconds"] = round(time.monotonic() - started)
            print(kind, json.dumps(results[kind], indent=1, ensure_ascii=True), flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    failed = [k for k in args.only if results[k]["wrong"] or results[k]["good_answers_changed"]]
    sys.exit(f"wrong: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
