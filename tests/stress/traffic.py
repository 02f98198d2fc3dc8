# SPDX-License-Identifier: Apache-2.0
"""Requests of many kinds, the reference's answer to each, and a client that sends and compares.

A request is the body of `/v1/completions`; an engine in this process gets the same as
`SamplingParams`. Every answer, greedy or drawn with a seed, is compared token by token with the
reference loop, which runs in this process.
"""

import asyncio
import contextlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import httpx
from engine.rules import reference_frames
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from benchmarks.parity import TIE, load_forward
from training.arithmetic import problems
from vllm_d2f.d2f import D2FParams
from vllm_d2f.hub.names import resolve
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.settings import PRESETS, Settings, request_params, settings_from_dict
from vllm_d2f.worker.grammar import Grammars

MODEL = "d2f-tiny"
MAX_LEN, WINDOW = 512, 256
"""Of the servers under test."""
ANSWER_SECONDS = 120
"""A request without an answer for so long is stuck, on a loaded machine too."""

SERVER_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LEN)),
    *("--additional-config", json.dumps({"d2f": {"window": WINDOW}})),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)

SETTINGS = [
    D2FParams(block_size, max_blocks, *taus)
    for block_size, max_blocks in ((4, 8), (8, 4), (8, 8), (16, 1), (16, 4), (32, 2), (32, 4))
    for taus in ((0.1, 0.95, 0.9), (0.7, 0.95, 0.6), (0.9, 0.5, 0.99))
]
"""Block sizes, window widths and thresholds (tau_add, tau_act, tau_conf) of engine requests."""
ENGINE_WINDOW = max(params.window for params in SETTINGS)

STRUCTURES: dict[str, dict[str, Any]] = {
    "regex": {"regex": r"(pens|apples): [0-9]{1,4}"},
    "choice": {"choice": ["yes", "no", "Leo has 9 pens"]},
    "schema": {
        "json": {
            "type": "object",
            "properties": {
                "thing": {"enum": ["pens", "apples", "shells"]},
                "left": {"type": "integer", "minimum": 0, "maximum": 9999},
            },
            "required": ["thing", "left"],
            "additionalProperties": False,
        }
    },
}
BAD: tuple[tuple[dict[str, Any], int], ...] = (
    ({"vllm_xargs": {"d2f_speed": 2}}, 400),
    ({"vllm_xargs": {"d2f_tau_conf": 1.5}}, 400),
    ({"vllm_xargs": {"d2f_block_size": 64, "d2f_max_blocks": 64}}, 400),
    ({"prompt": ""}, 400),
    ({"prompt": "Leo has 73 pens. " * 200}, 400),
    ({"max_tokens": 5000}, 400),
    ({"prompt_logprobs": 1}, 400),
    ({"structured_outputs": {"regex": "(("}}, 400),
    ({"n": 2}, 400),
    ({"model": "nobody"}, 404),
    ({"max_tokens": "many"}, 400),
)
"""What is wrong with the body of a bad request, and the status it must get."""

PLAIN = ("greedy", "traced", "endless")
RULED = ("drawn", "penalty", "logprobs", *STRUCTURES)
"""Kinds of requests for an engine: decoded greedily, and with rules of their own."""
HTTP_KINDS = (
    *("greedy", "greedy", "greedy", "long prompt", "long prompt", "preset", "block size"),
    *("thresholds", "thresholds", "random tokens", "drawn", "drawn", "n", "logprobs"),
    *("penalty", "stop string", *STRUCTURES, "endless", "bad"),
)
_SAMPLING = (
    *("temperature", "top_p", "max_tokens", "logprobs", "ignore_eos"),
    *("repetition_penalty", "presence_penalty"),
)


@dataclass(frozen=True)
class Known:
    """The answer of the reference; `tie` if rounding may decide otherwise."""

    tokens: tuple[int, ...]
    forwards: int
    tie: bool = False

    def equals(self, other: "Known") -> bool:
        return (self.tokens, self.forwards) == (other.tokens, other.forwards)


@dataclass(frozen=True)
class Ask:
    """One distinct request.

    Attributes:
        body: of /v1/completions.
        prompt: its prompt as token ids.
        known, texts: what must come, per choice. Empty where the status alone counts.
        status: HTTP status that must come.
    """

    kind: str
    body: dict[str, Any]
    prompt: tuple[int, ...] = ()
    known: tuple[Known, ...] = ()
    texts: tuple[str, ...] = ()
    status: int = 200

    def sampling_params(self, choice: int = 0) -> SamplingParams:
        """Do the same on an engine in this process. vLLM gives each of n choices its own seed."""
        options = {name: self.body[name] for name in _SAMPLING if name in self.body}
        if "structured_outputs" in self.body:
            structure = StructuredOutputsParams(**self.body["structured_outputs"])
            options["structured_outputs"] = structure
        if "seed" in self.body:
            options["seed"] = self.body["seed"] + choice
        xargs = dict(self.body.get("vllm_xargs", {}))
        return SamplingParams(detokenize=False, extra_args=xargs, **options)


def xargs_of(params: D2FParams) -> dict[str, Any]:
    """Return D2F settings as the options of a request."""
    return {f"d2f_{name}": value for name, value in asdict(params).items()}


def endless(prompt: Sequence[int], params: D2FParams, max_tokens: int, **options: Any) -> Ask:
    """Return a greedy request for an engine that ends only at `max_tokens`."""
    body = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return Ask("endless", body | {"vllm_xargs": xargs_of(params)} | options, tuple(prompt))


def make_asks(
    count: int,
    seed: int,
    kinds: Sequence[str] = HTTP_KINDS,
    settings: Sequence[D2FParams] | None = None,
) -> list[Ask]:
    """Draw `count` requests, of each kind in turn; their answers are not known yet.

    Args:
        settings: for an engine in this process. Each request gets one of them, and most prompts
            are random tokens: a question is answered in few forwards.
    """
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    questions = problems("test", 400, rng.randrange(1 << 31))
    asks = []
    for index in range(count):
        kind, status = kinds[index % len(kinds)], 200
        problem = rng.choice(questions)
        body = {"model": MODEL, "prompt": problem.question, "temperature": 0}
        body["max_tokens"] = rng.choice((32, 64))
        if kind == "bad":
            change, status = rng.choice(BAD)
            asks.append(Ask(kind, body | change, status=status))
            continue
        if kind == "long prompt":
            shots = [f"{p.question} {p.answer}" for p in rng.sample(questions, rng.randint(2, 5))]
            body["prompt"] = " ".join([*shots, problem.question])
        body |= _rules(kind, rng)
        if settings is not None:
            kind = _for_engine(kind, body, settings, rng)
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else tokenizer(prompt).input_ids
        asks.append(Ask(kind, body, tuple(ids)))
    return asks


def _rules(kind: str, rng: random.Random) -> dict[str, Any]:
    """Return the parameters of a kind of request beyond those of a greedy one."""
    if kind in STRUCTURES:
        return {"structured_outputs": STRUCTURES[kind], "max_tokens": 64}
    xargs: dict[str, Any] = {}
    match kind:
        case "long prompt":  # d2f-tiny has seldom more than a word to say
            return {"ignore_eos": rng.random() < 0.7}
        case "random tokens":
            return {"prompt": _random_tokens(rng, 200), "ignore_eos": rng.random() < 0.7}
        case "drawn" | "n":
            drawn = {"temperature": rng.choice((0.5, 1.0)), "seed": rng.randrange(1 << 31)}
            return drawn | ({"n": rng.choice((2, 3))} if kind == "n" else {})
        case "logprobs":
            return {"logprobs": rng.choice((0, 2, 5))}
        case "penalty":
            return {"repetition_penalty": 1.2, "presence_penalty": 0.3}
        case "stop string":
            return {"stop": [rng.choice(("=", "1", "3", "5"))]}
        case "endless":
            return {"ignore_eos": True, "max_tokens": rng.choice((96, 200))}
        case "traced":
            xargs["d2f_trace"] = 1
        case "preset":
            xargs["d2f_preset"] = rng.choice([n for n in PRESETS if n.startswith("dream-")])
        case "block size":
            xargs["d2f_block_size"] = rng.choice((1, 4, 8, 24, 32, 64))
        case "thresholds":
            xargs["d2f_block_size"] = rng.choice((4, 8, 16))
            xargs["d2f_max_blocks"] = rng.choice((1, 2, 4, 8))
            xargs["d2f_tau_add"] = rng.choice((0.0, 0.1, 0.7, 1.0))
            xargs["d2f_tau_act"] = rng.choice((0.0, 0.5, 0.95, 1.0))
            xargs["d2f_tau_conf"] = rng.choice((0.3, 0.9, 0.99, 1.0))
    return {"vllm_xargs": xargs} if xargs else {}


def _for_engine(
    kind: str, body: dict[str, Any], settings: Sequence[D2FParams], rng: random.Random
) -> str:
    """Give a request settings, a length and often its own prompt. Return its kind."""
    body["vllm_xargs"] = body.get("vllm_xargs", {}) | xargs_of(rng.choice(settings))
    if kind == "drawn":
        body["top_p"] = 0.95
    if kind not in STRUCTURES:
        body["max_tokens"] = rng.choice((1, 7, 16, 40, 90, 160))
    if rng.random() < 0.6:
        body["prompt"] = _random_tokens(rng, rng.choice((3, 20, 60, 130)))
        if kind in PLAIN and rng.random() < 0.8:  # many answers to random tokens end at once
            body["ignore_eos"], kind = True, "endless"
    return kind


def _random_tokens(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(2, 448) for _ in range(rng.randint(1, longest))]


class Reference:
    """The reference loop beside an engine, or a server, with the same configuration."""

    def __init__(self, vllm_config: Any, *, window: int, prompt_block: int | None = None) -> None:
        model = vllm_config.model_config.model
        self.loaded = load_forward(model)
        self.config = config = self.loaded[1]
        self.grammars = Grammars(vllm_config, config.mask_token_id)
        self.max_len = vllm_config.model_config.max_model_len
        self.window, self.prompt_block = window, prompt_block
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        section = settings_from_dict(config.d2f, {"window": window})
        self.settings = Settings(section.params, section.window, family="dream")

    def answers(self, asks: Iterable[Ask]) -> list[Ask]:
        """Return the requests with their expected answers."""
        return [self._answered(ask) if ask.status == 200 else ask for ask in asks]

    def _answered(self, ask: Ask) -> Ask:
        known, texts = [], []
        for choice in range(ask.body.get("n", 1)):
            answer = self.answer(ask, choice)
            text = str(self.tokenizer.decode(list(answer.tokens), skip_special_tokens=True))
            cuts = [text.find(stop) for stop in ask.body.get("stop", ()) if stop in text]
            known.append(answer)
            texts.append(text[: min(cuts)] if cuts else text)
        return replace(ask, known=tuple(known), texts=tuple(texts))

    def answer(self, ask: Ask, choice: int = 0) -> Known:
        """Decode one request."""
        params = request_params(self.settings, ask.body.get("vllm_xargs"))
        request, grammar = ask.sampling_params(choice), None
        assert len(ask.prompt) + request.max_tokens <= self.max_len
        if request.structured_outputs is not None:
            if not request.ignore_eos:  # the tokens that may end a structured output
                request.all_stop_token_ids.update(self.config.end_token_ids)
            validate_xgrammar_grammar(request)  # also writes a choice as a grammar
            request.structured_outputs._backend = "xgrammar"
            grammar = self.grammars.constraint(request)
        margin = math.inf
        for frame in reference_frames(
            self.loaded,
            ask.prompt,
            params,
            request,
            max_len=self.max_len,
            window=self.window,
            grammar=grammar,
            prompt_block=self.prompt_block,
        ):
            margin = min(margin, frame.margin)
        return Known(tuple(frame.tokens), frame.forward, margin < TIE)


def engine_answer(output: Any) -> Known:
    """Return tokens and forwards of a finished output of an engine in this process."""
    completion = output.outputs[0]
    return Known(tuple(completion.token_ids), denoising_forwards(completion))


def server_asks(
    count: int, seed: int, kinds: Sequence[str] = HTTP_KINDS, window: int = WINDOW
) -> list[Ask]:
    """Make requests for a server with `SERVER_OPTIONS`, with expected answers. Start no engine."""
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import EngineArgs

    structured = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    config = EngineArgs(
        model=resolve(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_LEN,
        additional_config={"d2f": {"window": window}},
        structured_outputs_config=structured,
    ).create_engine_config()
    return Reference(config, window=window).answers(make_asks(count, seed, kinds))


@dataclass
class Tally:
    """What clients saw.

    Attributes:
        equal, ties: answers by kind, equal to the reference and different after a decision that
            rounding may turn.
        refused: requests answered with the status they had to get.
        aborted: connections closed by the client, by when.
        wrong: everything else.
    """

    equal: Counter[str] = field(default_factory=Counter)
    ties: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
    streamed: int = 0
    tokens: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        counted = [self.equal, self.ties, self.refused, self.aborted]
        return {
            "requests": sum(c.total() for c in counted) + len(self.wrong),
            "equal_to_the_reference": self.equal.total(),
            "by_kind": dict(sorted(self.equal.items())),
            "ties": self.ties.total(),
            "refused_as_they_must_be": {str(k): v for k, v in sorted(self.refused.items())},
            "connections_closed": dict(sorted(self.aborted.items())),
            "streamed": self.streamed,
            "tokens": self.tokens,
            "wrong": len(self.wrong),
            "differences": self.wrong[:20],
        }


@dataclass
class Choice:
    """One answer as it came."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    forwards: int | None = None


@dataclass
class Got:
    """A response: its status, and its answers or what it says instead."""

    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    message: str = ""

    def add(self, data: dict[str, Any]) -> None:
        """Add the next event of a stream, or all of an answer."""
        if "error" in data:
            # vLLM checks some parameters when the stream has begun: HTTP 200 was sent.
            self.status = data["error"].get("code", 500)
            self.message = str(data["error"])[:300]
            return
        trace = (data.get("kv_transfer_params") or {}).get("d2f") or {}
        for part in data["choices"]:
            choice = self.choices.setdefault(part["index"], Choice())
            choice.text += part["text"]
            choice.tokens += part.get("token_ids") or []
            choice.finish = part.get("finish_reason") or choice.finish
            choice.forwards = trace.get("forwards")


class Client:
    """Sends requests to one server and compares."""

    def __init__(self, url: str, connections: int) -> None:
        self.tally = Tally()
        # Uvicorn closes a connection that was idle for 5 s; the client must be the first to do so.
        limits = httpx.Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=2,
        )
        # A proxy of the environment is not between us and our own server.
        self.http = httpx.AsyncClient(
            base_url=url, limits=limits, timeout=ANSWER_SECONDS, trust_env=False
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.http.aclose()

    async def ask(self, ask: Ask, *, stream: bool, may_refuse: int | None = None) -> bool:
        """Send one request to its end.

        Args:
            may_refuse: a status that counts as refused, whatever the request.

        Returns:
            False if it was refused so, and may be sent again.
        """
        body = ask.body | {"return_token_ids": True, "stream": stream}
        if not stream and len(ask.known) == 1:
            body["vllm_xargs"] = body.get("vllm_xargs", {}) | {"d2f_trace": 1}
        try:
            got = await self._send(body)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            self._wrong(ask, stream, error=repr(error))
            return True
        if got.status == may_refuse:
            self.tally.refused[got.status] += 1
            return False
        self._compare(ask, stream, got)
        return True

    async def _send(self, body: dict[str, Any]) -> Got:
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            got = Got(response.status_code)
            if got.status != 200:
                got.message = (await response.aread()).decode(errors="replace")[:300]
            elif not body["stream"]:
                got.add(json.loads(await response.aread()))
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        got.add(json.loads(line.removeprefix("data: ")))
        return got

    def _compare(self, ask: Ask, stream: bool, got: Got) -> None:
        tally = self.tally
        tally.streamed += stream
        if got.status != ask.status:
            self._wrong(ask, stream, status=got.status, message=got.message)
            return
        if not ask.known:
            tally.refused[got.status] += 1
        for index, (known, text) in enumerate(zip(ask.known, ask.texts, strict=True)):
            choice = got.choices.get(index, Choice())
            same = choice.text == text and choice.finish is not None
            # A stop string ends an answer at the text; the token that has it may be the last one.
            if "stop" not in ask.body:
                same = same and tuple(choice.tokens) == known.tokens
                same = same and choice.forwards in (None, known.forwards)
            tally.tokens += len(choice.tokens)
            if same:
                tally.equal[ask.kind] += 1
            elif known.tie:
                tally.ties[ask.kind] += 1
            else:
                self._wrong(ask, stream, expected=[text, asdict(known)], got=asdict(choice))

    def _wrong(self, ask: Ask, stream: bool, **what: Any) -> None:
        self.tally.wrong.append({"kind": ask.kind, "body": ask.body, "stream": stream} | what)

    async def abort(self, ask: Ask, rng: random.Random) -> None:
        """Send a request and close the connection: at once, while it waits, between chunks."""
        when = rng.choice(("at once", "waiting", "after a chunk", "after three", "not streamed"))
        body = ask.body | {"stream": when != "not streamed"}
        try:
            if when in ("after a chunk", "after three"):
                await self._hang_up(body, chunks=1 if when == "after a chunk" else 3)
            else:
                limit = 0.002 if when == "at once" else rng.uniform(0.003, 0.08)
                with contextlib.suppress(TimeoutError):
                    await self._hang_up(body, seconds=limit)
        except (TimeoutError, httpx.HTTPError) as error:
            self._wrong(ask, True, error=f"before we closed: {error!r}")
            return
        self.tally.aborted[when] += 1

    async def _hang_up(
        self, body: dict[str, Any], chunks: int | None = None, seconds: float = ANSWER_SECONDS
    ) -> None:
        """Send a request and close the connection after so many chunks, or at its end.

        On connections of its own: a request that is cancelled in a client's pool can take its
        place there with it, and after half an hour none is left.

        Raises:
            TimeoutError: after so many seconds; the connection is closed too.
            httpx.HTTPError: no connection, or the server ended it.
        """
        own = httpx.AsyncClient(
            base_url=self.http.base_url, timeout=None, trust_env=False, verify=False
        )
        async with (
            asyncio.timeout(seconds),
            own,
            own.stream("POST", "/v1/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if chunks is not None and line.startswith("data:"):
                    chunks -= 1
                    if not chunks:
                        return
