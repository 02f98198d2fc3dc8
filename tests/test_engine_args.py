# SPDX-License-Identifier: Apache-2.0
"""Every engine argument of vLLM is handled, refused or left to vLLM; none is replaced silently."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from checkpoints import write_dream
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

TABLE = json.loads((Path(__file__).parent / "data" / "engine_args.json").read_text())

REFUSED = {
    "diffusion_config": ({"canvas_length": 8}, "--diffusion-config: D2F's window takes its place"),
    "enable_batch_sharded_sampling": (True, None),  # vLLM refuses it for one rank
    "enable_chunked_prefill": (True, "--enable-chunked-prefill: a bidirectional prompt"),
    "enable_trace_replay": (True, "--enable-trace-replay: not supported"),
    "kv_offloading_size": (1.0, "--kv-offloading-size: not supported"),
    "long_prefill_token_threshold_adaptive": (True, "--long-prefill-token-threshold-adaptive: it"),
    "max_num_scheduled_tokens": (40, "--max-num-scheduled-tokens 40 must be at least 256"),
    "model_class_overrides": ({"OtherModel": "a.b:C"}, "--model-class-overrides: not supported"),
    "use_fp64_gumbel": (True, "--use-fp64-gumbel: not supported"),
}
"""Value and message. Those that vLLM's own configuration holds are in http/test_startup.py."""


@pytest.fixture(scope="module")
def dream(tmp_path_factory) -> Path:
    return write_dream(tmp_path_factory.mktemp("d2f"), d2f={"block_size": 8, "max_blocks": 2})


def config(model: Path, **options) -> VllmConfig:
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256} | options
    return EngineArgs(model=str(model), **options).create_engine_config()


def test_the_table_names_every_argument_once():
    """A vLLM with another argument fails here: decide what D2F does with it."""
    names = [*TABLE["d2f"], *TABLE["refused"], *TABLE["vllm"]]
    assert sorted(names) == sorted(field.name for field in fields(AsyncEngineArgs))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_replaced_is_refused(dream, name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config(dream, **{name: value})


def test_a_block_causal_model_has_chunked_prefill(dream):
    causal = {"additional_config": {"d2f": {"prompt_attention": "block_causal"}}}
    asked = config(dream, enable_chunked_prefill=True, **causal)
    assert asked.scheduler_config.enable_chunked_prefill
    assert config(dream, max_num_scheduled_tokens=32, **causal)
    with pytest.raises(ValueError, match="--max-num-scheduled-tokens 31 must be at least 32"):
        config(dream, max_num_scheduled_tokens=31, **causal)


def test_what_is_not_given_is_not_refused(dream):
    """vLLM's own default of chunked prefill is no wish of the user, in a second start neither."""
    for _ in range(2):
        assert not config(dream).scheduler_config.enable_chunked_prefill
    args = EngineArgs(model=str(dream), dtype="float32", enforce_eager=True)
    args.create_engine_config()
