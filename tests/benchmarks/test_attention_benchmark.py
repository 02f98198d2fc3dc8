# SPDX-License-Identifier: Apache-2.0
"""The attention benchmark: right by a float64 reference, honest about what it did not run."""

import itertools
import json

import pytest
import torch

from benchmarks import attention
from benchmarks.attention_problem import PAGE, Case, Layer, Problem, Unavailable
from benchmarks.attention_variants import JIT_SOURCE, JIT_VARIANT, VARIANTS, cascade_levels

CPU = torch.device("cpu")
LAYER = Layer(4, 2, 32)


def problem(context=37, requests=2, blocks=3, block_size=8, seed=0):
    case = Case(context, requests, blocks, block_size)
    return Problem.make(case, LAYER, CPU, torch.float32, seed)


@pytest.mark.parametrize("name", ["virtual", "sdpa", "sdpa_paged"])
@pytest.mark.parametrize(
    "shape",
    itertools.product((1, 37, 64), (1, 3), (1, 4), (8, 16)),
    ids=lambda s: "-".join(map(str, s)),
)
def test_variants_agree_with_float64(name, shape):
    one = problem(*shape)
    assert one.error(VARIANTS[name](one)(), most=3) < 2e-5


def test_a_causal_or_bidirectional_result_would_be_caught():
    """Without the block rule the reference must disagree."""
    one = problem()
    query, key, value = (
        x.transpose(1, 2) for x in (one.query_THD.view(2, 24, 4, 32), one.key_RLKD, one.value_RLKD)
    )
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert one.error(out.transpose(1, 2).flatten(0, 1)) > 1e-2


CUDA_ONLY = {name for name in VARIANTS if name.startswith(("flashinfer", "vllm"))}


@pytest.mark.parametrize("name", sorted(CUDA_ONLY))
def test_without_cuda_a_variant_says_so(name):
    with pytest.raises(Unavailable, match="CUDA"):
        VARIANTS[name](problem())


@pytest.mark.parametrize("context", [32, 37, 64, 70])
def test_levels_of_a_cascade_merge_to_the_whole(context):
    """Each key belongs to one level, and softmax sums merge them exactly."""
    one = Problem.make(Case(context, 3, 3, 8), LAYER, CPU, torch.float64, 0)
    group = LAYER.heads // LAYER.kv_heads
    states = []
    for query_start, page_start, pages, last in cascade_levels(one):
        out = torch.zeros_like(one.query_THD)
        lse = torch.zeros(one.query_THD.shape[:2], dtype=torch.float64)
        for s in range(len(last)):
            listed = pages[page_start[s] : page_start[s + 1]].long()
            length = (len(listed) - 1) * PAGE + int(last[s])
            key, value = (
                x[listed].flatten(0, 1)[:length].repeat_interleave(group, 1) for x in one.paged
            )
            rows = slice(query_start[s], query_start[s + 1])
            scores = torch.einsum("qhd,khd->qhk", one.query_THD[rows], key) / LAYER.head_dim**0.5
            lse[rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), value)
        states.append((out, lse))
    (a, lse_a), (b, lse_b) = states
    weight = torch.sigmoid(lse_a - lse_b)[..., None]
    assert one.error(weight * a + (1 - weight) * b, most=3) < 1e-12


def test_the_mask_of_the_jit_variant():
    """Its formula, translated line by line, is the attention rule."""
    one = problem(context=37, blocks=3, block_size=8)
    kv_len, qo_len, block = one.length, one.case.window, one.case.block_size
    qo_idx, kv_idx = torch.arange(qo_len)[:, None], torch.arange(kv_len)[None]
    mask = kv_idx < kv_len - qo_len + (qo_idx // block + 1) * block
    assert torch.equal(mask, one.mask_WL())
    source = " ".join(JIT_SOURCE.split())
    assert "kv_idx < kv_len - qo_len + (qo_idx / block + 1) * block" in source
    assert f"struct {JIT_VARIANT} :" in source


def test_floor_counts_the_allowed_pairs():
    one = problem(context=32, requests=2, blocks=2, block_size=16)
    found = attention.bounds(one, {"copy_gb_per_s": 10.0, "matmul_gflop_per_s": 100.0})
    assert found["flops"] == 2 * 4 * 4 * 32 * int(one.mask_WL().sum())
    assert found["bytes"] == 4 * 2 * (2 * 64 * 2 * 32 + 2 * 32 * 4 * 32)
    by_bytes, by_flops = found["bytes"] / 10e9, found["flops"] / 100e9
    assert found["floor_ms"] == pytest.approx(1e3 * max(by_bytes, by_flops))
    assert found["bound"] == ("bytes" if by_bytes > by_flops else "flops")


def test_a_wrong_variant_and_a_failing_one_say_so(monkeypatch, tmp_path, capsys):
    rates = {"copy_gb_per_s": 1, "matmul_gflop_per_s": 1}

    def run(set_up):
        monkeypatch.setitem(VARIANTS, "sdpa", set_up)
        return attention.measure(problem(), ["sdpa"], rates, 1)["variants"]["sdpa"]

    assert run(lambda p: lambda: torch.zeros_like(p.query_THD))["wrong_by"] > 1e-3
    assert attention.main(["--quick", "--variants", "sdpa", "virtual"]) == 1
    assert "wrong_by" in capsys.readouterr().out
    assert "nan" in str(run(lambda p: lambda: p.query_THD * torch.nan))

    def broken(problem):
        raise RuntimeError("made up")

    assert "made up" in run(broken)["failed"]

    def lost(problem):
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="CUDA error"):
        run(lost)  # the process is of no use any more


def test_bars_and_wins_come_from_the_rows():
    variants = {
        "virtual": {"ms": 0.011, "times_floor": 1.1},
        "flashinfer_cascade": {"ms": 0.010, "times_floor": 1.0},
        "flashinfer_mask": {"failed": "no kernel"},
        "sdpa": {"ms": 0.001, "times_floor": 0.1},
    }
    case = {"context": 512, "blocks": 4, "block_size": 32, "variants": variants}
    rows = [case | {"requests": 1}, case | {"requests": 64}]
    found = attention.summary(rows)
    # Fastest of those that read pages, by 10 %, in the one case that matters.
    assert found["flashinfer_cascade"]["wins_that_matter"] == 1
    assert found["virtual"]["wins_that_matter"] == found["sdpa"]["wins_that_matter"] == 0
    assert found["sdpa"]["fastest_in_cases"] == 2 and "flashinfer_mask" not in found
    assert attention.worst_ratio(rows, 1) == 1.0 and attention.worst_ratio(rows, 16) is None


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--layer", "8,2"], "28,4,128"),
        (["--layer", "8,3,64"], "multiple"),
        (["--layer", "a,b,c"], "28,4,128"),
        (["--blocks", "0"], "at least 1"),
        (["--device", "cuda", "--clock", "cpu"], "nothing of what runs on a GPU"),
    ],
)
def test_bad_arguments_say_what_to_pass(arguments, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        attention.parse(arguments)
    assert hint in capsys.readouterr().err


def test_quick(tmp_path):
    path = tmp_path / "attention.json"
    assert attention.main(["--quick", "--clock", "cpu", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {"command", "versions", "hardware", "seed", "units", "floor", "skipped"} <= report.keys()
    assert report["skipped"].keys() == CUDA_ONLY
    assert str(tmp_path) not in path.read_text()
    for row in report["rows"]:
        assert {"virtual", "sdpa", "sdpa_paged"} == attention.timed(row).keys()
        for cell in attention.timed(row).values():
            assert cell.keys() <= report["units"].keys()
            assert 0 <= cell["ms_min"] <= cell["ms"]
            ratio = cell["ms"] / row["floor_ms"]
            assert cell["times_floor"] == pytest.approx(ratio, rel=0.02, abs=0.01)
    text = path.with_suffix(".md").read_text()
    assert "| virtual |" in text and "Times are CPU time" in text
