# SPDX-License-Identifier: Apache-2.0
"""The attention benchmark: right by a float64 reference, honest about what it did not run."""

import itertools
import json

import pytest
import torch

from benchmarks import attention
from benchmarks.attention_problem import Case, Layer, Problem, Unavailable
from benchmarks.attention_variants import VARIANTS

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


@pytest.mark.parametrize("name", ["flashinfer_mask", "flashinfer_cascade"])
def test_without_cuda_flashinfer_says_so(name):
    with pytest.raises(Unavailable, match="CUDA"):
        VARIANTS[name](problem())


def test_floor_counts_the_allowed_pairs():
    one = problem(context=32, requests=2, blocks=2, block_size=16)
    found = attention.bounds(one, {"copy_gb_per_s": 10.0, "matmul_gflop_per_s": 100.0})
    assert found["flops"] == 2 * 4 * 4 * 32 * int(one.mask_WL().sum())
    assert found["bytes"] == 4 * 2 * (2 * 64 * 2 * 32 + 2 * 32 * 4 * 32)
    by_bytes, by_flops = found["bytes"] / 10e9, found["flops"] / 100e9
    assert found["floor_ms"] == pytest.approx(1e3 * max(by_bytes, by_flops))
    assert found["bound"] == ("bytes" if by_bytes > by_flops else "flops")


def test_a_wrong_variant_stops_the_benchmark(monkeypatch):
    monkeypatch.setitem(VARIANTS, "sdpa", lambda p: lambda: torch.zeros_like(p.query_THD))
    with pytest.raises(AssertionError, match="sdpa is wrong"):
        attention.measure(problem(), ["sdpa"], {"copy_gb_per_s": 1, "matmul_gflop_per_s": 1}, 1)


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
    assert {"flashinfer_mask", "flashinfer_cascade"} == report["skipped"].keys()
    assert str(tmp_path) not in path.read_text()
    for row in report["rows"]:
        assert {"virtual", "sdpa", "sdpa_paged"} == row["variants"].keys()
        for cell in row["variants"].values():
            assert cell.keys() <= report["units"].keys()
            assert 0 <= cell["ms_min"] <= cell["ms"]
            ratio = cell["ms"] / row["floor_ms"]
            assert cell["times_floor"] == pytest.approx(ratio, rel=0.02, abs=0.01)
    text = path.with_suffix(".md").read_text()
    assert "| virtual |" in text and "Times are CPU time" in text
