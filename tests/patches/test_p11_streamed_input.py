# SPDX-License-Identifier: Apache-2.0
"""p11: a D2F model takes no prompt in pieces; with another model nothing changes."""

import asyncio
import inspect
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_d2f.patches.p07_refusals import STREAMED_INPUT, p11_streamed_input
from vllm_d2f.patches.patch import function_of, source_hash

METHOD = "_add_streaming_input_request"
PROMPT = "Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?"


async def pieces():
    yield StreamingInput(prompt=PROMPT)


def test_it_was_written_against_this_vllm():
    found = source_hash(vars(AsyncLLM)[METHOD])
    assert found == p11_streamed_input.written_against[STREAMED_INPUT]


def test_installing_twice_wraps_once(monkeypatch):
    stock = function_of(vars(AsyncLLM)[METHOD])
    monkeypatch.setattr(AsyncLLM, METHOD, stock)
    p11_streamed_input.install()
    p11_streamed_input.install()
    assert vars(AsyncLLM)[METHOD]._d2f_original is stock


def test_another_model_goes_the_stock_way():
    seen = []

    async def original(self, *args):
        seen.append(args)
        return "queue"

    patched = p11_streamed_input.wrap(STREAMED_INPUT, original)
    other = SimpleNamespace(model_config=SimpleNamespace(architectures=["Qwen2ForCausalLM"]))
    stock = function_of(vars(AsyncLLM)[METHOD])
    given = [f"argument {i}" for i in range(len(inspect.signature(stock).parameters) - 1)]
    assert asyncio.run(patched(other, *given)) == "queue"
    assert seen == [tuple(given)]


def test_a_d2f_model_refuses_and_goes_on(monkeypatch):
    """A real engine: the session is refused before it starts, and a whole prompt is answered."""
    # A fork of a process in which other tests have run may wait for a lock of theirs for ever.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    async def run():
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model="d2f-tiny",
                dtype="float32",
                enforce_eager=True,
                max_model_len=128,
                kv_cache_memory_bytes=1 << 26,
                disable_log_stats=True,
            )
        )
        params = SamplingParams(
            temperature=0, max_tokens=16, output_kind=RequestOutputKind.CUMULATIVE
        )
        try:
            with pytest.raises(VLLMValidationError, match="in pieces.*whole prompt at once"):
                async for _ in engine.generate(pieces(), params, "pieces"):
                    pass
            async for output in engine.generate(PROMPT, params, "whole"):
                text = output.outputs[0].text
            return text
        finally:
            engine.shutdown()

    assert "73+24" in asyncio.run(asyncio.wait_for(run(), 300))


def test_still_needed():
    """Fails when vLLM itself asks what the model is: then delete p11."""
    stock = function_of(vars(AsyncLLM)["_validate_streaming_input_sampling_params"])
    stock(SamplingParams(output_kind=RequestOutputKind.DELTA))
    assert list(inspect.signature(stock).parameters) == ["params"]
