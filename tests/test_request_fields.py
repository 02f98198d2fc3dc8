# SPDX-License-Identifier: Apache-2.0
"""D2F's options are honoured or refused by every endpoint of vLLM's application, by one rule."""

import json
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.testclient import TestClient
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers import app as launcher
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_d2f.patches.p08_request_fields import MIDDLEWARE, p08_request_fields
from vllm_d2f.patches.patch import configs

from vllm_d2f import register
from vllm_d2f.admission import check_sampling_params
from vllm_d2f.d2f import Beginning, Window, add, step
from vllm_d2f.request_fields import REMOVED_FIELDS, RequestFields, check_default_greedy
from vllm_d2f.settings import request_params, served_settings

GENERATE = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
}
"""The least that the walk over the routes must meet."""

WRONG = {
    "unknown": ({"d2f_no_such_option": 1}, "unknown option 'd2f_no_such_option'"),
    "range": ({"d2f_block_size": 0}, "d2f_block_size must be an integer in [1, "),
    "preset": ({"d2f_preset": "no-such-preset"}, "d2f_preset must be one of"),
    "xargs": ({"vllm_xargs": {"d2f_tau_conf": 7}}, "d2f_tau_conf must be a number in [0, 1]"),
    "xargs unknown": ({"vllm_xargs": {"speed": 7}}, "unknown option 'speed'"),
    "twice": ({"vllm_xargs": {"d2f_tau_conf": 1}, "d2f_tau_conf": 1}, "stands in vllm_xargs and"),
    "inside": ({"sampling_params": {"d2f_tau_conf": 7}}, "d2f_tau_conf must be a number"),
    "half": ({"prompt": "a \ud83d"}, "holds half of a character"),
    "half a stop": ({"stop": ["\udc00"]}, "send the whole character"),
    **{name: ({name: "x"}, f"{name} is not supported any more; use") for name in REMOVED_FIELDS},
}


@pytest.fixture(scope="module")
def served():
    register()
    return EngineArgs(model="d2f-tiny", dtype="float32", enforce_eager=True).create_engine_config()


@pytest.fixture(scope="module")
def client(served):
    """vLLM's application without an engine, with the patch that a server installs."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launcher, "init_entrypoints_middleware", _middleware())
        patched.setitem(configs, "server", served)
        app = launcher.build_app(args, ("generate", "render"), served.model_config)
    return TestClient(app, raise_server_exceptions=False)


def _middleware():
    return p08_request_fields.wrap(MIDDLEWARE, launcher.init_entrypoints_middleware)


def posts(app: FastAPI) -> list[str]:
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return sorted({route.path for route in routes if "POST" in route.methods})


def test_every_endpoint_refuses(client):
    """Also those that generate nothing, and those that a later vLLM adds."""
    paths = posts(client.app)
    assert set(paths) >= GENERATE
    for path in paths:
        for fields, message in WRONG.values():
            body = json.dumps({"model": "d2f-tiny", **fields})  # which escapes all but ASCII
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (path, fields)
            assert message in answer.json()["error"]["message"], (path, fields)


def test_what_is_right_reaches_the_endpoint(client):
    """It has no engine here, and answers that its own fields are missing."""
    for path in GENERATE:
        for body in ({"d2f_tau_conf": 0.5}, {"d2f_tau_conf": None, "guided_json": None}, {}):
            answer = client.post(path, json=body)
            assert "d2f" not in answer.text and "guided" not in answer.text, (path, answer.text)
    broken = client.post(
        "/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400 and "JSON" in broken.text


def test_the_options_reach_the_engine(served):
    """Of an endpoint that makes its sampling parameters itself, as `/generative_scoring` does."""
    app, settings = FastAPI(), served_settings(served.model_config)
    app.add_middleware(RequestFields, settings=settings)

    @app.post("/score")
    async def score(request: Request) -> dict:
        await request.json()
        params = SamplingParams(max_tokens=1)
        for _ in range(2):  # an endpoint may send the same parameters twice
            check_sampling_params(params, served.model_config)
        return params.extra_args or {}

    client = TestClient(app)
    given = {"d2f_tau_conf": 0.5, "vllm_xargs": {"d2f_block_size": 8}}
    assert client.post("/score", json=given).json() == {"d2f_tau_conf": 0.5, "d2f_block_size": 8}
    assert client.post("/score", json={"other": [1]}).json() == {}
    assert client.post("/score", json=[1]).json() == {}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_several_greedy_answers_by_default(kind):
    """The message says that greedy is the default, and what to send."""
    prompt = {"prompt": "1"} if kind is CompletionRequest else {"messages": []}
    with pytest.raises(VLLMValidationError, match="default temperature of this model is 0.*0.7"):
        check_default_greedy(kind(**prompt, n=2), {"temperature": 0.0})
    check_default_greedy(kind(**prompt, n=2, temperature=0.7), {"temperature": 0.0})
    check_default_greedy(kind(**prompt, n=2), {"temperature": 0.7})
    check_default_greedy(kind(**prompt, n=1), {"temperature": 0.0})
    check_default_greedy(SimpleNamespace(), {"temperature": 0.0})  # an endpoint without n


def test_long_bodies_arrive_whole(served):
    app = FastAPI()
    app.add_middleware(RequestFields, settings=served_settings(served.model_config))

    @app.post("/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    body = json.dumps({"prompt": "x" * (1 << 20)}).encode()
    chunks = (body[at : at + 10_000] for at in range(0, len(body), 10_000))
    assert TestClient(app).post("/length", content=chunks).json() == len(body)
    assert (
        TestClient(app).post("/length", content=b"\xff", headers={"content-type": "audio/x"}).json()
        == 1
    )


@pytest.mark.parametrize("depth", [900, 30_000])
def test_a_body_that_is_nested_too_deeply(served, depth):
    """Python's JSON reader or writer ends with a RecursionError, which was HTTP 500."""
    fields = RequestFields(FastAPI(), served_settings(served.model_config))
    body = '{"prompt": "p", "x": ' + '{"a":' * depth + "1" + "}" * depth + "}"
    if depth < 1000:
        assert fields.options(body.encode()) == {}
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            fields.options(body.encode())


def test_a_single_scored_token_is_decoded_first(served):
    """Whatever rule the model has: its probabilities are those beside masked positions only."""
    scored = SamplingParams(max_tokens=1, logprob_token_ids=[5, 6])
    check_sampling_params(scored, served.model_config)
    params = request_params(served_settings(served.model_config), scored.extra_args)
    window = Window.empty(1, params.window, 8, 1)
    window.start([0], [Beginning(params, 1, 64, [0])], 1)
    add(window)
    sure_W = torch.linspace(0.1, 0.99, params.window)
    done = step(window, torch.full((1, params.window), 7), sure_W[None], 1)
    assert (done.tokens_RW[0, : int(window.open_R)] == 7).nonzero()[:, 0].tolist() == [0]
    own = SamplingParams(max_tokens=1, logprob_token_ids=[5], extra_args={"d2f_tau_conf": 0.5})
    check_sampling_params(own, served.model_config)
    assert own.extra_args["d2f_tau_conf"] == 0.5
