# SPDX-License-Identifier: Apache-2.0
"""What a start with the wrong model or options says. Most tests stop at vLLM's configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_dream
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

HINT = """--additional-config '{"d2f": {"block_size": 32, "max_blocks": 4}}'"""


def config(model: Path | str, **options) -> VllmConfig:
    """Return what `vllm serve` builds before it starts an engine."""
    options = {"dtype": "float32", "enforce_eager": True} | options
    return EngineArgs(model=str(model), **options).create_engine_config()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A checkpoint as on the Hub: nothing in it says how D2F decodes."""
    return write_dream(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def dream(tmp_path_factory) -> Path:
    return write_dream(tmp_path_factory.mktemp("d2f"), d2f={"block_size": 8, "max_blocks": 2})


def test_a_checkpoint_without_settings_is_refused_with_the_hint(plain):
    with pytest.raises(ValueError, match="no D2F settings") as refusal:
        config(plain)
    assert HINT in str(refusal.value) and "dream-gsm8k" in str(refusal.value)
    assert str(plain) in str(refusal.value)


def test_the_hint_helps(plain):
    served = config(plain, additional_config={"d2f": {"block_size": 32, "max_blocks": 4}})
    assert served.diffusion_config.canvas_length == 128
    assert served.scheduler_config.scheduler_cls == "vllm_d2f.scheduler.D2FScheduler"
    assert not served.model_config.trust_remote_code


def test_a_preset_helps(plain):
    served = config(plain, additional_config={"d2f": {"preset": "dream-humaneval"}})
    assert served.model_config.hf_config.d2f["tau_add"] == 0.9


def test_the_command_line_is_stronger_than_the_checkpoint(dream):
    assert config(dream).diffusion_config.canvas_length == 16
    served = config(dream, additional_config={"d2f": {"max_blocks": 4}})
    assert served.model_config.hf_config.d2f["block_size"] == 8
    assert served.diffusion_config.canvas_length == 32


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"preset": "dream"}, "unknown preset 'dream'; known are dream-gsm8k"),
        ({"blocks": 4}, "unknown setting 'blocks'; known are accept, adaptive_window"),
        ({"tau_conf": 2}, r"tau_conf must be a number in \[0, 1\], got 2"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"block_size": 64, "max_blocks": 4, "window": 128}, "window 128 must be between"),
        ({"block_size": 64, "max_blocks": 1000}, "must be between"),
        ({"prompt_attention": "causal"}, "must be one of bidirectional, block_causal"),
        ("fast", "must be an object"),
    ],
)
def test_wrong_settings_are_named(plain, section, message):
    with pytest.raises(ValueError, match=message):
        config(plain, additional_config={"d2f": section})


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config",
        ),
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "--pipeline-parallel-size",
        ),
        ({"logits_processors": ["some.module:Class"]}, "--logits-processors"),
        ({"scheduler_cls": "some.module.Class"}, "--scheduler-cls"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
        ({"watermark_config": {"algorithm": "gumbel", "key": 7}}, "--watermark-config"),
    ],
)
def test_options_d2f_cannot_honour_are_refused_by_their_flag(dream, options, flag):
    with pytest.raises(ValueError, match="vllm-d2f cannot serve with these options") as refusal:
        config(dream, **options)
    assert flag in str(refusal.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="Did you mean d2f-tiny") as refusal:
        config("d2f-tyni")
    assert "ar-tiny" in str(refusal.value)


def test_a_published_name_offline_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.setenv("D2F_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="python -m vllm_d2f prepare d2f-dream-7b --base DIR"):
        config("d2f-dream-7b")


def test_prompts_prefill_whole(dream):
    served = config(dream, max_model_len=700, max_num_batched_tokens=128, max_num_seqs=4)
    assert not served.scheduler_config.enable_chunked_prefill
    assert served.scheduler_config.max_num_batched_tokens >= 700


def test_a_cpu_reserves_what_the_requests_can_fill(dream, monkeypatch):
    """vLLM's 92 % of the memory would not even start where others use some of it."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    cache = config(dream, max_model_len=512, max_num_seqs=64).cache_config
    model = config(dream).model_config
    token = 2 * model.get_num_kv_heads(config(dream).parallel_config) * model.get_head_size() * 4
    pages = 65 * (512 // 128 + 1)
    layers = model.hf_config.num_hidden_layers
    assert cache.kv_cache_memory_bytes == max(pages * 128 * token * layers, 1 << 28)
    assert cache.kv_cache_memory_bytes < 1 << 30
    wide = config(dream, max_num_seqs=4096, max_num_batched_tokens=1 << 20).cache_config
    assert wide.kv_cache_memory_bytes > cache.kv_cache_memory_bytes


@pytest.mark.parametrize(
    "option",
    [
        {"kv_cache_memory_bytes": 1 << 25},
        {"gpu_memory_utilization": 0.5},
        {"num_gpu_blocks_override": 32},
    ],
)
def test_what_the_user_says_about_memory_stands(dream, option):
    cache = config(dream, **option).cache_config
    assert cache.kv_cache_memory_bytes == option.get("kv_cache_memory_bytes")
    assert cache.gpu_memory_utilization == option.get("gpu_memory_utilization", 0.92)


def test_the_command_shows_the_reason_and_ends(plain):
    """As a user meets it: the last lines of `vllm serve`, and exit status 1."""
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "serve", plain, "--dtype", "float32"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 1
    assert HINT in done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(attention_backend="FLASHINFER"), "--attention-backend FLASHINFER needs CUDA"),
        (dict(attention_backend="TRITON_ATTN"), "--attention-backend TRITON_ATTN needs CUDA"),
        (
            dict(compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"}, enforce_eager=False),
            "cudagraph_mode FULL_AND_PIECEWISE in --compilation-config needs CUDA",
        ),
    ],
)
def test_what_needs_cuda_is_refused_on_a_cpu(dream, options, named):
    if not current_platform.is_cpu():
        pytest.skip("there is CUDA")
    with pytest.raises(ValueError, match=r"pip install 'vllm-d2f\[gpu\]'") as refusal:
        config(dream, **options)
    assert named in str(refusal.value)


def test_what_a_cpu_has_may_be_named(dream):
    if not current_platform.is_cpu():
        pytest.skip("there is CUDA")
    config(dream, attention_backend="CPU_ATTN", compilation_config={"cudagraph_mode": "NONE"})
    config(dream, enforce_eager=False)
