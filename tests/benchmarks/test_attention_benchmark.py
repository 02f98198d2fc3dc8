# SPDX-License-Identifier: Apache-2.0
"""The attention benchmark: right by a float64 reference, honest about what it did not run."""

import itertools
import json

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import VARIANTS, Case, Layer, Problem, Unavailable

CPU = torch.device("cpu")
LAYER = Layer(4, 2, 32)


def problem(context=37, requests=2, blocks=3, block_size=8, seed=0):
    case = Case(context, requests, blocks, block_size)
    return Problem.make(case, LAYER, CPU, torch.float32, seed)


@pytest.mark.parametrize("name", VARIANTS)
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

    def lacking(problem):
        raise Unavailable("flashinfer is not installed")

    assert run(lacking) == {"unavailable": "flashinfer is not installed"}

    def lost(problem):
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="CUDA error"):
        run(lost)  # the process is of no use any more


def test_the_summary_and_the_bar_come_from_the_rows():
    variants = {
        "virtual": {"ms": 0.012, "times_floor": 1.2},
        "sdpa_paged": {"ms": 0.010, "times_floor": 1.0},
        "sdpa": {"ms": 0.001, "times_floor": 0.1},
        "broken": {"failed": "no kernel"},
    }
    case = {"context": 512, "blocks": 4, "block_size": 32, "variants": variants}
    rows = [case | {"requests": 1}, case | {"requests": 64}]
    found = attention.summary(rows)
    assert found["sdpa"]["fastest_in_cases"] == 2 and "broken" not in found
    assert found["sdpa_paged"]["median_speed_vs_virtual"] == 1.2
    # The bar holds the best of those that read pages against the floor.
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
    assert not report["skipped"]
    assert str(tmp_path) not in path.read_text()
    for row in report["rows"]:
        assert VARIANTS.keys() == attention.timed(row).keys()
        for cell in attention.timed(row).values():
            assert cell.keys() <= report["units"].keys()
            assert 0 <= cell["ms_min"] <= cell["ms"]
            ratio = cell["ms"] / row["floor_ms"]
            assert cell["times_floor"] == pytest.approx(ratio, rel=0.02, abs=0.01)
    text = path.with_suffix(".md").read_text()
    assert "| virtual |" in text and "Times are CPU time" in text
