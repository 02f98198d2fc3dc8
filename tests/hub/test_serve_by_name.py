# SPDX-License-Identifier: Apache-2.0
"""`vllm serve NAME` from nothing: download, merge, serve; tokens as of peft's own merged model."""

import os
import random
import subprocess
import sys
from pathlib import Path

import httpx
import openai
from hub_standin import serve

from benchmarks.parity import TIE
from vllm_d2f.hub import cache
from vllm_d2f.models import PUBLISHED
from vllm_d2f.reference import decode, hf_forward
from vllm_d2f.settings import settings_from_dict

sys.path.insert(0, str(Path(__file__).parents[1] / "http"))

from http_server import free_port, stop, wait_until_ready  # noqa: E402

MAX_TOKENS = 48


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(190) for _ in range(rng.randint(3, 40))] for _ in range(count)]


def expected(made, name: str, shift: bool) -> list[tuple[list[int], list[int]]]:
    """Prompts and the reference loop's answers, on peft's merged model with the name's settings."""
    vocab = made.model.config.vocab_size
    answers = []
    for prompt in prompts(5):
        frames = decode(
            hf_forward(made.model),
            prompt,
            settings_from_dict(PUBLISHED[name].d2f).params,
            max_tokens=MAX_TOKENS,
            mask_id=vocab - 2,
            ends=(vocab - 1,),
            shift=shift,
        )
        frames = list(frames)
        if min(frame.margin for frame in frames) >= TIE:  # not decided by rounding
            answers.append((prompt, frames[-1].tokens))
    assert len(answers) >= 3, "too many ties for this to be a test"
    return answers


def test_first_use_of_a_name(made_dream, tmp_path, cache_folder):
    """The whole way in one command, against the stand-in of the Hub."""
    name = "d2f-dream-7b"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serve() as hub, (tmp_path / "log").open("w+") as log:
        hub.add(PUBLISHED[name].base, made_dream.base)
        hub.add(PUBLISHED[name].adapter, made_dream.adapter)
        local = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("vllm"), "serve", name, "--host", "127.0.0.1"),
                *("--port", str(port), "--dtype", "float32", "--enforce-eager"),
                *("--max-num-seqs", "4", "--kv-cache-memory-bytes", str(1 << 26)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ
            | local
            | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
            | {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
            | {"HF_HUB_DISABLE_XET": "1", "D2F_CACHE": str(cache_folder)},
            start_new_session=True,
        )
        try:
            wait_until_ready(process, url, log)
            assert cache.inspect(cache_folder / name).kind == "ready"
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                assert [model.id for model in client.models.list()] == [name]
            for prompt, tokens in expected(made_dream, name, shift=True):
                body = {"model": name, "prompt": prompt, "max_tokens": MAX_TOKENS}
                body |= {"temperature": 0, "return_token_ids": True}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=100).json()
                assert answer["choices"][0]["token_ids"] == tokens
        finally:
            stop(process)
        log.seek(0)
        text = log.read()
    assert f"{name}: first use. Downloading" in text and f"merging {name}" in text
    # Nothing but the model's files was asked for, each once, by one process.
    files = [file for file, _ in hub.transfers()]
    assert len(files) == len(set(files)) == 4


def test_prepared_from_folders(made_llada, cache_folder, monkeypatch):
    """Offline, in this process: the names of LLaDA's adapter are OLMo's."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    from vllm_d2f.hub.prepare import plan_of, prepare

    name = "d2f-llada-8b"
    plan = plan_of(name, str(made_llada.base), str(made_llada.adapter))
    prepare(name, plan)
    llm = LLM(
        name,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 26,
    )
    answers = expected(made_llada, name, shift=False)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in answers],
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        use_tqdm=False,
    )
    for (_, tokens), output in zip(answers, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == tokens
    llm.llm_engine.engine_core.shutdown()
