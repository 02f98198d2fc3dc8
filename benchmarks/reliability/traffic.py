# SPDX-License-Identifier: Apache-2.0
"""Requests over HTTP, what they must be answered, and clients that send them and compare.

Shared by `soak`, `overload` and the HTTP part of `aborts`. Every answer, greedy or drawn with a
seed, is compared token by token with the reference loop, which runs in this process.
"""

import asyncio
import contextlib
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.reliability.truth import Known, Truth
from vllm_d2f.settings import PRESETS, Settings, request_params, settings_from_dict

MODEL = "d2f-tiny"
MAX_LEN = 512
WINDOW = 256
ANSWER_SECONDS = 120
"""A request without an answer for so long is stuck, on a loaded machine too."""

SERVER_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LEN)),
    *("--additional-config", json.dumps({"d2f": {"window": WINDOW}})),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)

REGEX = r"(pens|apples): [0-9]{1,4}"
SCHEMA = {
    "type": "object",
    "properties": {
        "thing": {"enum": ["pens", "apples", "shells"]},
        "left": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["thing", "left"],
    "additionalProperties": False,
}
BAD: dict[str, tuple[dict[str, Any], int]] = {
    "unknown option": ({"vllm_xargs": {"d2f_speed": 2}}, 400),
    "threshold": ({"vllm_xargs": {"d2f_tau_conf": 1.5}}, 400),
    "window": ({"vllm_xargs": {"d2f_block_size": 64, "d2f_max_blocks": 64}}, 400),
    "empty prompt": ({"prompt": ""}, 400),
    "long prompt": ({"prompt": "Leo has 73 pens. " * 200}, 400),
    "long answer": ({"max_tokens": 5000}, 400),
    "prompt logprobs": ({"prompt_logprobs": 1}, 400),
    "grammar": ({"structured_outputs": {"regex": "(("}}, 400),
    "two greedy": ({"n": 2}, 400),
    "other model": ({"model": "nobody"}, 404),
    "no number": ({"max_tokens": "many"}, 400),
}
"""Bad requests: what is wrong with the body, and the status."""


@dataclass(frozen=True)
class HttpAsk:
    """One distinct request.

    Attributes:
        kind: for the report.
        body: of /v1/completions.
        known: per choice what must come, or None where the status alone counts.
        texts: per choice the text.
        status: HTTP status that must come.
    """

    kind: str
    body: dict[str, Any]
    known: tuple[Known, ...] | None = None
    texts: tuple[str, ...] = ()
    status: int = 200


def make_http_asks(
    count: int, seed: int, truth: Truth, *, kinds: Sequence[str] | None = None
) -> list[HttpAsk]:
    """`count` distinct requests, those with bad bodies among them."""
    from tqdm import tqdm

    maker = _Maker(random.Random(seed), truth)
    chosen = list(kinds or _Maker.KINDS)
    return [
        maker.make(chosen[i % len(chosen)]) for i in tqdm(range(count), "requests", disable=None)
    ]


class _Maker:
    """Makes requests of each kind and asks the reference."""

    KINDS = (
        *("greedy", "greedy", "greedy", "long prompt", "long prompt", "preset", "block size"),
        *("thresholds", "thresholds", "random tokens", "drawn", "drawn", "n", "logprobs"),
        *("penalty", "stop string", "regex", "schema", "choice", "endless", "bad"),
    )

    def __init__(self, rng: random.Random, truth: Truth) -> None:
        from transformers import AutoTokenizer

        from training.arithmetic import problems
        from vllm_d2f.hub.names import resolve

        self.rng, self.truth = rng, truth
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
        self.problems = problems("test", 400, rng.randrange(1 << 31))
        section = settings_from_dict(truth.config.d2f, {"window": truth.window})
        self.settings = Settings(section.params, section.window, family="dream")

    def make(self, kind: str) -> HttpAsk:
        rng = self.rng
        problem = rng.choice(self.problems)
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": problem.question,
            "max_tokens": rng.choice((32, 64)),
            "temperature": 0,
        }
        if kind == "bad":
            change, status = rng.choice(list(BAD.values()))
            return HttpAsk(kind, body | change, status=status)
        xargs: dict[str, Any] = {}
        if kind == "long prompt":
            count = rng.randint(2, 5)
            shots = [f"{p.question} {p.answer}" for p in rng.sample(self.problems, count)]
            body["prompt"] = " ".join([*shots, problem.question])
            body["ignore_eos"] = rng.random() < 0.7  # d2f-tiny has seldom more than a word to say
        elif kind == "preset":
            xargs["d2f_preset"] = rng.choice([n for n in PRESETS if n.startswith("dream-")])
        elif kind == "block size":
            xargs["d2f_block_size"] = rng.choice((1, 4, 8, 24, 32, 64))
        elif kind == "thresholds":
            xargs |= {
                "d2f_block_size": rng.choice((4, 8, 16)),
                "d2f_max_blocks": rng.choice((1, 2, 4, 8)),
                "d2f_tau_add": rng.choice((0.0, 0.1, 0.7, 1.0)),
                "d2f_tau_act": rng.choice((0.0, 0.5, 0.95, 1.0)),
                "d2f_tau_conf": rng.choice((0.3, 0.9, 0.99, 1.0)),
            }
        elif kind == "random tokens":
            body["prompt"] = [rng.randrange(2, 448) for _ in range(rng.randint(1, 200))]
            body["ignore_eos"] = rng.random() < 0.7
        elif kind in ("drawn", "n"):
            body |= {"temperature": rng.choice((0.5, 1.0)), "seed": rng.randrange(1 << 31)}
            if kind == "n":
                body["n"] = rng.choice((2, 3))
        elif kind == "logprobs":
            body["logprobs"] = rng.choice((0, 2, 5))
        elif kind == "penalty":
            body |= {"repetition_penalty": 1.2, "presence_penalty": 0.3}
        elif kind == "stop string":
            body["stop"] = [rng.choice(("=", "1", "3", "5"))]
        elif kind in ("regex", "schema", "choice"):
            constraint = {
                "regex": REGEX,
                "schema": SCHEMA,
                "choice": ["yes", "no", "Leo has 9 pens"],
            }
            name = {"schema": "json"}.get(kind, kind)
            body["structured_outputs"] = {name: constraint[kind]}
            body["max_tokens"] = 64
        elif kind == "endless":
            body |= {"ignore_eos": True, "max_tokens": rng.choice((96, 200))}
        if xargs:
            body["vllm_xargs"] = xargs
        return self._with_answers(kind, body)

    def _with_answers(self, kind: str, body: dict[str, Any]) -> HttpAsk:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        same = ("temperature", "max_tokens", "logprobs", "repetition_penalty", "presence_penalty")
        options = {name: body[name] for name in (*same, "ignore_eos") if name in body}
        if "structured_outputs" in body:
            options["structured_outputs"] = StructuredOutputsParams(**body["structured_outputs"])
        assert len(ids) + body["max_tokens"] <= MAX_LEN
        params = request_params(self.settings, body.get("vllm_xargs"))
        known, texts = [], []
        for index in range(body.get("n", 1)):
            # vLLM gives each of n answers a seed of its own.
            seed = body["seed"] + index if "seed" in body else None
            answer = self.truth.answer(ids, params, SamplingParams(seed=seed, **options))
            text = str(self.tokenizer.decode(list(answer.answer.tokens), skip_special_tokens=True))
            cuts = [text.find(stop) for stop in body.get("stop", ()) if stop in text]
            known.append(answer)
            texts.append(text[: min(cuts)] if cuts else text)
        return HttpAsk(kind, body, tuple(known), tuple(texts))


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        equal, ties: answers by kind, equal to the reference and different after a decision that
            rounding may turn.
        refused: requests answered with the status they had to get.
        aborted: connections closed by the client, by when.
        wrong: everything else.
        first_s, whole_s: seconds to the first token (streamed ones) and to the end.
    """

    equal: Counter[str] = field(default_factory=Counter)
    ties: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
    streamed: int = 0
    tokens: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        counters: Sequence[Counter[Any]] = (self.equal, self.ties, self.refused, self.aborted)
        return sum(sum(counter.values()) for counter in counters) + len(self.wrong)

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.sent,
            "equal_to_the_reference": sum(self.equal.values()),
            "by_kind": dict(sorted(self.equal.items())),
            "ties": sum(self.ties.values()),
            "refused_as_they_must_be": {str(k): v for k, v in sorted(self.refused.items())},
            "connections_closed": dict(sorted(self.aborted.items())),
            "streamed": self.streamed,
            "tokens": self.tokens,
            "wrong": len(self.wrong),
            "differences": self.wrong[:20],
        }


class Client:
    """Sends requests to one server and compares."""

    def __init__(self, url: str, connections: int) -> None:
        self.tally = Tally()
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        timeout = httpx.Timeout(ANSWER_SECONDS)
        address = httpx.URL(url)
        self.host, self.port = address.host, address.port
        # A proxy of the environment is not between us and our own server.
        self.http = httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout, trust_env=False)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.http.aclose()

    async def ask(self, ask: HttpAsk, *, stream: bool, may_refuse: int | None = None) -> str:
        """Send one request to its end.

        Args:
            may_refuse: a status that counts as refused, whatever the request.

        Returns:
            "answered", "refused", or "broken": no answer at all came.
        """
        body = ask.body | {"return_token_ids": True}
        if not stream and ask.known is not None and len(ask.known) == 1:
            body["vllm_xargs"] = body.get("vllm_xargs", {}) | {"d2f_trace": 1}
        try:
            if stream:
                got = await self._streamed(body | {"stream": True})
            else:
                got = await self._whole(body)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            self._wrong(ask, stream, error=repr(error))
            return "broken"
        if got.status == may_refuse:
            self.tally.refused[got.status] += 1
            return "refused"
        self.compare(ask, stream, got)
        return "answered"

    async def abort(self, ask: HttpAsk, rng: random.Random) -> None:
        """Send a request and close the connection: at once, while it waits, between chunks."""
        body = ask.body | {"stream": True, "max_tokens": ask.body.get("max_tokens", 64)}
        when = rng.choice(("at once", "waiting", "after a chunk", "after three", "not streamed"))
        body["stream"] = when != "not streamed"
        try:
            if when in ("after a chunk", "after three"):
                await self._hang_up(body, chunks=1 if when == "after a chunk" else 3)
            else:
                limit = 0.002 if when == "at once" else rng.uniform(0.003, 0.08)
                with contextlib.suppress(TimeoutError):
                    await self._hang_up(body, seconds=limit)
        except OSError as error:
            self._wrong(ask, True, error=f"before we closed: {error!r}")
            return
        self.tally.aborted[when] += 1

    async def _hang_up(
        self, body: dict[str, Any], chunks: int | None = None, seconds: float = ANSWER_SECONDS
    ) -> None:
        """Send a request and close the connection after so many chunks, or at its end.

        On a connection of its own: a request that is cancelled in the client's pool can take its
        place there with it, and after half an hour none is left.

        Raises:
            TimeoutError: after so many seconds; the connection is closed too.
            OSError: no connection, or the server ended it.
        """
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            content = json.dumps(body).encode()
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
                "Content-Type: application/json\r\nConnection: close\r\n"
                f"Content-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            await writer.drain()
            async with asyncio.timeout(seconds):
                while chunks != 0 and (line := await reader.readline()):
                    if chunks is not None:
                        chunks -= line.startswith(b"data:")
        finally:
            writer.transport.abort()

    def compare(self, ask: HttpAsk, stream: bool, got: "Got") -> None:
        """Count one answer."""
        tally = self.tally
        tally.streamed += stream
        if got.status != ask.status:
            self._wrong(ask, stream, status=got.status, message=got.message)
            return
        if ask.known is None:
            tally.refused[got.status] += 1
            return
        stop = bool(ask.body.get("stop"))
        for index, (known, text) in enumerate(zip(ask.known, ask.texts, strict=True)):
            choice = got.choices.get(index, Choice())
            tokens = tuple(choice.tokens)
            # A stop string ends an answer at the text; the token that has it may be the last one.
            same = choice.text == text and (stop or tokens == known.answer.tokens)
            if same and not stop and choice.forwards is not None:
                same = choice.forwards == known.answer.forwards
            if same and choice.finish is None:
                same = False
            tally.tokens += len(tokens)
            if same:
                tally.equal[ask.kind] += 1
            elif known.tie:
                tally.ties[ask.kind] += 1
            else:
                self._wrong(
                    ask,
                    stream,
                    choice=index,
                    expected=[text, list(known.answer.tokens), known.answer.forwards],
                    got=[choice.text, choice.tokens, choice.forwards, choice.finish],
                )

    def _wrong(self, ask: HttpAsk, stream: bool, **what: Any) -> None:
        self.tally.wrong.append({"kind": ask.kind, "body": ask.body, "stream": stream} | what)

    async def _whole(self, body: dict[str, Any]) -> "Got":
        response = await self.http.post("/v1/completions", json=body)
        if response.status_code != 200:
            return Got(response.status_code, message=response.text[:300])
        data, got = response.json(), Got(200)
        trace = (data.get("kv_transfer_params") or {}).get("d2f") or {}
        for part in data["choices"]:
            choice = got.choices.setdefault(part["index"], Choice())
            choice.add(part)
            choice.forwards = trace.get("forwards")
        return got

    async def _streamed(self, body: dict[str, Any]) -> "Got":
        got = Got(200)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Got(response.status_code, message=text[:300])
            async for data in _events(response):
                if "error" in data:
                    # vLLM looks at some parameters when the stream has begun: the status is gone.
                    code = data["error"].get("code", 500)
                    return Got(code, message=str(data["error"])[:300])
                for part in data["choices"]:
                    got.choices.setdefault(part["index"], Choice()).add(part)
        return got


@dataclass
class Choice:
    """One answer as it came."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    forwards: int | None = None

    def add(self, part: dict[str, Any]) -> None:
        """The next part of a stream, or all of it."""
        self.text += part["text"]
        self.tokens += part.get("token_ids") or []
        self.finish = part.get("finish_reason") or self.finish


@dataclass
class Got:
    """A response: its status, and its answers or what it says instead."""

    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    message: str = ""


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent stream."""
    async for line in response.aiter_lines():
        if match := re.fullmatch(r"data: (\{.*\})", line):
            yield json.loads(match[1])


def server_config() -> Any:
    """vLLM's configuration of the server, made here for the reference. Starts no engine."""
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_d2f.hub.names import resolve

    return EngineArgs(
        model=resolve(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_LEN,
        additional_config={"d2f": {"window": WINDOW}},
        structured_outputs_config=StructuredOutputsConfig(
            backend="xgrammar", disable_any_whitespace=True
        ),
    ).create_engine_config()
