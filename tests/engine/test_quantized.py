# SPDX-License-Identifier: Apache-2.0
"""Quantised weights and caches through vLLM's own options, on d2f-tiny and vLLM's CPU kernels.

On CUDA the same options take other kernels of vLLM's; what needs those is marked `gpu`.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from published_runs import DATA, published_runs
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams

from benchmarks.parity import Case, engine_answers, shut_down, start_engine
from training.arithmetic import problems
from vllm_d2f.hub.names import resolve

GROUP = 32
"""Input channels that share a scale in the 4-bit checkpoint."""

WIDE = pytest.mark.skipif(
    not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="vLLM's CPU build has these kernels for AVX-512 only",
)
MODEL = Path(resolve("d2f-tiny"))
ITEMS = list(problems("test", 32, 5))


def answers(model: str | Path, **options) -> list[str]:
    """Greedy answers to all problems, by an engine with these options."""
    defaults = dict(dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=16)
    llm = LLM(str(model), kv_cache_memory_bytes=1 << 27, **(defaults | options))
    try:
        params = SamplingParams(temperature=0, max_tokens=64)
        outputs = llm.generate([item.question for item in ITEMS], params, use_tqdm=False)
        return [output.outputs[0].text.strip() for output in outputs]
    finally:
        shut_down(llm)


def exact(texts: list[str]) -> int:
    return sum(text == item.answer for text, item in zip(texts, ITEMS, strict=True))


@WIDE
@pytest.mark.parametrize("cache", ["fp8", "fp8_e5m2"])
def test_fp8_cache(cache):
    assert exact(answers(MODEL, kv_cache_dtype=cache)) >= 28


@pytest.mark.gpu
def test_fp8_weights():
    """Quantised when they are loaded, as with `vllm serve --quantization fp8`.

    vLLM's CPU build has no operator that does it (`_C::static_scaled_fp8_quant`).
    """
    assert exact(answers(MODEL, quantization="fp8")) >= 28


@WIDE
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_four_bit_checkpoint(tmp_path, method):
    """Its answers are those of the same weights written out, not just good ones."""
    plain, packed = four_bit(MODEL, tmp_path, method)
    expected, got = answers(plain), answers(packed)
    assert exact(expected) >= 16  # rounding to nearest costs a small model something
    same = sum(a == b for a, b in zip(expected, got, strict=True))
    assert same >= 30 and abs(exact(expected) - exact(got)) <= 2


@WIDE
@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["sdar", "fast_dllm_v2", "stable_diffcoder"])
def test_four_bit_checkpoint_of_a_family(tmp_path, family, method):
    """The weights are random and sure of nothing, so rounding in bfloat16 decides many tokens.

    By chance one of 199 would be equal. Of experts vLLM has four-bit kernels on a GPU only, so
    LLaDA2.0 is not here.
    """
    runs, tokens = published_runs(family), []
    for folder in four_bit(DATA / family, tmp_path, method):
        llm = start_engine(str(folder), window=64, max_model_len=144, dtype="bfloat16")
        cases = [Case(run.prompt, run.params, 4) for run in runs]
        tokens.append([token for a in engine_answers(llm, cases, "batch") for token in a.tokens])
        shut_down(llm)
    pairs = list(zip(*tokens, strict=False))
    same = sum(a == b for a, b in pairs)
    assert same >= 0.4 * len(pairs)


def four_bit(model: Path, parent: Path, method: str) -> tuple[Path, Path]:
    """Return a checkpoint with the rounded weights written out, and one with them in four bits."""
    plain, packed = parent / "plain", parent / "packed"
    for folder in (plain, packed):
        shutil.copytree(model, folder)
    small, written_out = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if LINEAR.search(name):
            parts, weight = quantise(weight, method)
            small |= {name.replace("weight", key): value for key, value in parts.items()}
        else:
            small[name] = weight
        written_out[name] = weight
    save_file(small, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(written_out, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = SECTIONS[method]
    (packed / "config.json").write_text(json.dumps(config))
    return plain, packed


LINEAR = re.compile(r"(_proj|query_key_value|attention\.dense)\.weight$")
SECTIONS = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
    },
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours a place of AWQ's int32 holds."""


def quantise(weight_OI: torch.Tensor, method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """To four bits by rounding: the checkpoint's tensors, and what they stand for [O, I]."""
    weight_IO = weight_OI.T.contiguous()
    groups = weight_IO.view(-1, GROUP, weight_IO.shape[1])
    scale = (groups.abs().amax(1) / 7.5).half().clamp(min=1e-4)  # [I / GROUP, O]
    codes = (groups / scale[:, None].float()).round().clamp(-8, 7) + 8
    restored = ((codes - 8) * scale[:, None].float()).view_as(weight_IO)
    codes = codes.view_as(weight_IO).int()
    eights = torch.full((scale.shape[0], codes.shape[1]), 8, dtype=torch.int32)
    if method == "gptq":  # packed along the input; a zero point is stored less one
        parts = {
            "qweight": pack(codes.T.contiguous()).T.contiguous(),
            "qzeros": pack(eights - 1),
            "g_idx": torch.arange(len(codes), dtype=torch.int32) // GROUP,
        }
    else:
        parts = {"qweight": pack(codes, AWQ_ORDER), "qzeros": pack(eights, AWQ_ORDER)}
    return parts | {"scales": scale}, restored.T.contiguous()


def pack(codes_NM: torch.Tensor, order=range(8)) -> torch.Tensor:
    """Eight 4-bit numbers of a row into an int32, the first of `order` in the lowest bits."""
    eight = codes_NM.view(len(codes_NM), -1, 8).long()
    total = sum(eight[:, :, source] << (4 * place) for place, source in enumerate(order))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()
