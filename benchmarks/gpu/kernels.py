# SPDX-License-Identifier: Apache-2.0
"""Stage b: what this package runs on the device is right, against float64 on the same inputs.

`host`: what is there, and what the device can do. `backend`: the FlashInfer backend as vLLM calls
it, random batches in every phase. `confidence`: the kernel at the vocabularies of Dream and LLaDA,
and its time against reading the logits once. `tests`: pytest's tests that are marked `gpu`.

Shape suffixes: T tokens, H query heads, K key heads, D head size, P pages, N rows, V vocabulary.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.stage import Options, Points, Skip
from benchmarks.gpu.timing import copies, machine, measure

HEADS = {"dream": (28, 4), "llada": (32, 32), "multi-query": (4, 1)}
PAGES = (16, 32, 128)
HEAD = 128
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "fp8": 2e-2, "fp8_e5m2": 2e-2}
"""Of attention's result, against float64 on the same rounded keys and values."""
VOCABULARIES = {"dream": 152064, "llada": 126464}
ROWS = (1, 32, 128, 1024)
RULES = {"greedy": 2e-5, "temperature": 2e-5, "top_k": 2e-5, "top_p": 1e-3, "min_p": 1e-3}
"""Allowed relative error of a confidence. Where a limit is a sum or a quotient, its rounding
decides about the last token kept, whose weight is that of one token in a vocabulary."""


def points(part: str, options: Options) -> Points:
    yield from {
        "host": _host,
        "backend": _backend,
        "confidence": _confidence,
        "tests": _tests,
    }[part](options)


def _host(options: Options) -> Points:
    def found() -> dict[str, Any]:
        there: dict[str, Any] = {}
        for name in ("vllm", "flashinfer", "triton", "transformers", "vllm_d2f", "accelerate"):
            try:
                module = importlib.import_module(name)
                there[name] = str(getattr(module, "__version__", "there"))
            except Exception as error:  # what is missing is a result
                there[name] = f"missing: {type(error).__name__}: {str(error)[:200]}"
        device = torch.device(options.device)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            there |= {
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "processors": properties.multi_processor_count,
                "capability": f"{properties.major}.{properties.minor}",
            }
            try:
                import vllm._custom_ops  # noqa: F401

                there["vllm_ops"] = hasattr(torch.ops._C, "silu_and_mul")
            except Exception as error:
                there["vllm_ops"] = f"missing: {error}"[:200]
        return there

    yield "host/found", found

    def rates() -> dict[str, Any]:
        dtype = torch.float32 if options.rehearse else torch.bfloat16
        return dict(machine(torch.device(options.device), dtype))

    yield "host/machine", rates


# The FlashInfer backend.


def _backend(options: Options) -> Points:
    kinds = ("bfloat16",) if options.quick else ("bfloat16", "float16", "fp8", "fp8_e5m2")
    pages = PAGES[:1] if options.quick else PAGES
    for model, heads in HEADS.items():
        for kind in kinds:
            for page_size in pages:
                key = f"backend/{model}/{kind}/page{page_size}"

                def check(
                    heads: tuple[int, int] = heads, kind: str = kind, page: int = page_size
                ) -> dict[str, Any]:
                    if options.rehearse:
                        raise Skip("FlashInfer needs a CUDA device; see test_flashinfer_plan.py")
                    error = max(backend_error(heads, kind, page, seed) for seed in range(4))
                    if not error <= TOLERANCE[kind]:
                        raise AssertionError(f"off by {error}, allowed {TOLERANCE[kind]}")
                    return {"max_error": error, "allowed": TOLERANCE[kind]}

                yield key, check


def random_batch(rng: np.random.Generator, num_reqs: int) -> tuple[np.ndarray, ...]:
    """start, stop, prompt length, block size of requests in every phase of their life."""
    prompt, block = rng.integers(1, 400, num_reqs), rng.integers(1, 65, num_reqs)
    start, stop = np.zeros((2, num_reqs), dtype=np.int64)
    for r in range(num_reqs):
        committed = prompt[r] + block[r] * rng.integers(0, 6)
        phase = rng.integers(4)
        if phase == 0:  # a prompt
            stop[r] = prompt[r]
        elif phase == 1:  # a window
            start[r], stop[r] = committed, committed + rng.integers(1, 257)
        else:  # computed again after a preemption, or the tail behind cached pages
            stop[r] = committed
            start[r] = rng.integers(0, committed) if phase == 3 else 0
    return start, stop, prompt, block


def backend_error(
    heads: tuple[int, int], kind: str, page_size: int, seed: int, where: str = "cuda"
) -> float:
    """Largest difference between the backend on a random batch and dense float64."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheLayout

    from vllm_d2f.attention import flashinfer
    from vllm_d2f.blocks import block_sequences as virtual_sequences
    from vllm_d2f.d2f import may_attend

    device, rng = torch.device(where), np.random.default_rng(seed)
    fp8 = flashinfer.CACHE_TYPES.get(kind)
    dtype = torch.bfloat16 if fp8 else getattr(torch, kind)
    num_reqs = int(rng.integers(1, 9))
    batch = start, stop, prompt, block = random_batch(rng, num_reqs)
    per_request = -(-int(stop.max()) // page_size)
    table_RP = torch.from_numpy(rng.permutation(num_reqs * per_request).astype(np.int32))
    table_RP = table_RP.view(num_reqs, per_request).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    cache = torch.randn(
        num_reqs * per_request, page_size, heads[1], 2 * HEAD, generator=generator, device=device
    ).to(fp8 or dtype)
    # In memory tokens before heads (LBNHC), seen in vLLM's logical order.
    cache = cache.transpose(1, 2)
    sequences = virtual_sequences(*batch)
    query_start = torch.from_numpy(sequences.query_start_S1)
    kv_len = torch.from_numpy(sequences.kv_len_S)
    common = CommonAttentionMetadata(
        query_start_loc=query_start.to(device),
        query_start_loc_cpu=query_start,
        seq_lens=kv_len.to(device),
        seq_lens_cpu_upper_bound=kv_len,
        num_reqs=len(kv_len),
        num_actual_tokens=int(query_start[-1]),
        max_query_len=int(query_start.diff().max()),
        max_seq_len=int(kv_len.max()),
        block_table_tensor=table_RP[torch.from_numpy(sequences.request_S).to(device)],
        slot_mapping=torch.zeros(0, device=device),
        causal=False,
    )
    builder = _builder(flashinfer, heads, kind if fp8 else "auto", dtype, page_size, device)
    impl = flashinfer.BlockCausalImpl(
        heads[0], HEAD, HEAD**-0.5, heads[1], kv_cache_dtype=kind if fp8 else "auto"
    )
    query_THD = torch.randn(
        int(query_start[-1]), heads[0], HEAD, generator=generator, device=device
    ).to(dtype)
    output = torch.full_like(query_THD, torch.nan)
    scales = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    stored = cache.view(torch.uint8) if fp8 else cache
    unused = torch.empty(0)  # keys and values are in the cache already
    impl.forward(scales, query_THD, unused, unused, stored, builder.build(0, common), output)
    assert builder.vllm_config.cache_config.get_resolved_kv_cache_layout() is KVCacheLayout.LBNHC

    worst, at = 0.0, 0
    for r in range(num_reqs):
        length = int(stop[r])
        position = torch.arange(length, device=device)
        page = table_RP[r].long()[position // page_size]
        key, value = (
            x.repeat_interleave(heads[0] // heads[1], 1)
            for x in cache.double()[page, :, position % page_size].split(HEAD, dim=-1)
        )
        rows = slice(at, at := at + length - int(start[r]))
        scores = torch.einsum("qhd,khd->hqk", query_THD[rows].double(), key) / HEAD**0.5
        allowed = may_attend(
            position[int(start[r]) :, None], position[None], int(prompt[r]), int(block[r])
        )
        weight = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        want = torch.einsum("hqk,khd->qhd", weight, value)
        worst = max(worst, float((output[rows].double() - want).abs().max().nan_to_num(torch.inf)))
    return worst


def _builder(
    module: Any, heads: tuple[int, int], kind: str, dtype: torch.dtype, page: int, device: Any
) -> Any:
    """The backend's builder for one layer, without an engine around it."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    layer = SimpleNamespace(num_heads=heads[0], impl=SimpleNamespace(scale=HEAD**-0.5))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            cache_dtype=kind, get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC
        ),
        model_config=SimpleNamespace(
            dtype=dtype, max_model_len=2048, hf_config=SimpleNamespace(d2f={"max_blocks": 8})
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=16),
    )
    spec = SimpleNamespace(num_kv_heads=heads[1], head_size=HEAD, block_size=page)
    layers_of = module.get_layers_from_vllm_config
    module.get_layers_from_vllm_config = lambda *_: {"layer": layer}
    try:
        return module.BlockCausalBuilder(spec, ["layer"], config, device)
    finally:
        module.get_layers_from_vllm_config = layers_of


# The confidence kernel.


def _confidence(options: Options) -> Points:
    rows = ROWS[:2] if options.quick else ROWS
    for model, size in VOCABULARIES.items():
        for count in rows:
            for rule in RULES:

                def check(size: int = size, count: int = count, rule: str = rule) -> dict[str, Any]:
                    if options.rehearse:
                        raise Skip("Triton needs a CUDA device; see tests/kernels")
                    return confidence_figures(size, count, rule)

                yield f"confidence/{model}/{rule}/{count}", check


def sampling(rule: str, count: int, device: str) -> Any:
    """Settings of rows under one rule; None: greedy."""
    from vllm_d2f.sampling.sample import Sampling

    if rule == "greedy":
        return None
    out = Sampling.greedy(count, device)
    out.temperature_R[:] = 0.8
    out.seed_R[:] = torch.arange(count, device=device) * 7919
    if rule == "top_k":
        out.top_k_R[:] = 50
    elif rule == "top_p":
        out.top_p_R[:] = 0.9
    elif rule == "min_p":
        out.min_p_R[:] = 0.05
    return out


def confidence_figures(size: int, count: int, rule: str, device: str = "cuda") -> dict[str, Any]:
    """Right, and how fast against reading the logits once."""
    from vllm_d2f.sampling import confidence_kernel as confidence

    mask_id = size - 5
    sets = copies(2 * size * count)
    inputs = []
    for seed in range(sets):
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(count, size, generator=generator, device=device)
        inputs.append((3 * logits).to(torch.bfloat16))
    how = sampling(rule, count, device)
    counters = torch.arange(count, device=device)
    extra = () if how is None else (how, counters, counters % 7)
    token_N, confidence_N = confidence.sample(inputs[0], mask_id, *extra)
    same, error = confidence_error(inputs[0], mask_id, token_N, confidence_N, how, counters)
    if not same or not error <= RULES[rule]:
        raise AssertionError(f"tokens equal: {same}; relative error {error}, not {RULES[rule]}")
    runs = [lambda x=x: confidence.sample(x, mask_id, *extra) for x in inputs]
    timing = measure(runs, torch.device(device))
    gb_per_s = 2 * size * count / timing.ms / 1e6
    return {**timing.as_dict(), "relative_error": error, "logits_gb_per_s": round(gb_per_s, 1)}


def confidence_error(
    logits_NV: Tensor,
    mask_id: int,
    token_N: Tensor,
    confidence_N: Tensor,
    how: Any,
    counters_N: Tensor,
) -> tuple[bool, float]:
    """Whether the tokens are `proposal`'s, and the confidence's error against float64.

    The limits of a rule are applied in float64 as well; the token is taken as given.
    """
    from vllm_d2f.sampling.sample import sample_drawn, sample_greedy

    plain_NV = logits_NV.float()
    if how is None:
        want_N, _ = sample_greedy(plain_NV.clone(), mask_id)
    else:
        want_N, _ = sample_drawn(plain_NV, mask_id, how, counters_N, counters_N % 7)
    exact_NV = plain_NV.double()
    exact_NV[:, mask_id] = -torch.inf
    if how is not None:
        # Scaled in float32 as the definition says; sums in float64.
        exact_NV = (plain_NV / how.temperature_R[:, None]).double()
        exact_NV[:, mask_id] = -torch.inf
        exact_NV = _limited(exact_NV, how)
    want = exact_NV.softmax(-1).gather(1, token_N[:, None])[:, 0]
    error = ((confidence_N.double() - want).abs() / want.clamp(min=1e-12)).max()
    return torch.equal(token_N, want_N), float(error)


def _limited(values_NV: Tensor, how: Any) -> Tensor:
    """-inf where min_p, top_k or top_p leave a token out; ties keep the lower id."""
    floor_N1 = values_NV.amax(1, keepdim=True) + how.min_p_R.double().log()[:, None]
    values_NV = values_NV.masked_fill(values_NV < floor_N1, -torch.inf)
    sorted_NV, order_NV = values_NV.sort(dim=1, descending=True, stable=True)
    rank_V = torch.arange(values_NV.shape[1], device=values_NV.device)
    k_N1 = torch.where(how.top_k_R > 0, how.top_k_R, values_NV.shape[1])[:, None]
    sorted_NV = sorted_NV.masked_fill(rank_V >= k_N1, -torch.inf)
    before_NV = sorted_NV.softmax(1).cumsum(1) - sorted_NV.softmax(1)
    limit_N1 = torch.where(how.top_p_R < 1, how.top_p_R, 2.0).double()[:, None]
    sorted_NV = sorted_NV.masked_fill(before_NV >= limit_N1, -torch.inf)
    return torch.empty_like(values_NV).scatter_(1, order_NV, sorted_NV)


# The tests that need a device.


def _tests(options: Options) -> Points:
    def run() -> dict[str, Any]:
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
        files = device_tests("tests/kernels" if options.quick or options.rehearse else "tests")
        done = subprocess.run([*words, *files], capture_output=True, text=True)
        print(done.stdout[-20000:], done.stderr[-5000:])
        return test_counts(done.stdout, done.returncode)

    yield "tests/gpu", run


def device_tests(folder: str) -> list[str]:
    """The files with tests that need a device.

    Others are not even collected: a bundle lacks what some of them read when they are imported.
    """
    files = sorted(Path(folder).rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def test_counts(output: str, code: int) -> dict[str, Any]:
    """Counts from pytest's last line, and the names of what failed.

    Raises:
        Skip: pytest is not there.
        AssertionError: something failed.
    """
    if not output.strip():
        raise Skip("pytest is not installed on the host")
    counts = {
        kind: int(number)
        for number, kind in re.findall(
            r"(\d+) (passed|failed|skipped|deselected|error)", output.splitlines()[-1]
        )
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if failed or code not in (0, 5):
        raise AssertionError(f"pytest ended with {code}: {counts}; {', '.join(failed)[:400]}")
    return {"exit_code": code, **counts}


test_counts.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's
