# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for CUDA, which needs no device. The interpreter accepts more than that."""

import os

import pytest

triton = pytest.importorskip("triton")

SCALAR = "i32"
ROW = dict(logits="*bf16", row_stride=SCALAR, size=SCALAR, mask_at=SCALAR)
OUT = dict(order_out="*i64", value_out="*fp32", max_out="*fp32", sum_out="*fp32")
TILES = dict(order_in="*i64", max_in="*fp32", sum_in="*fp32", first_token=SCALAR, tiles=SCALAR)
RULES = dict(temperature="*fp32", top_k="*i64", top_p="*fp32", min_p="*fp32")
KEYS = dict(temperature="*fp32", seed="*i64", position="*i64", forward="*i64")
CUT = dict(max_tiles="*fp32", cut_in="*fp32", last_in="*i32", kept_out="*fp32")
SIZES = dict(ROW_TILES=64, TILE=4096)
MOMENT = dict(moment_in="*fp32", moment_out="*fp32")
NO_MOMENT = dict(moment_in=None, moment_out=None)

CASES = [
    (
        "_tiles",
        {**ROW, **OUT, "first_token": SCALAR},
        {"temperature": None, "moment_out": None, "TILE": 4096},
    ),
    (
        "_reduce",
        {**ROW, **TILES, **OUT},
        {"temperature": None, "kept_in": None, "row_max": None, "ROW_TILES": 64, **NO_MOMENT},
    ),
    (
        "_cut",
        {**ROW, **RULES, "max_tiles": "*fp32", "cut_out": "*fp32", "last_out": "*i32"}
        | {"order_in": "*i64", "first_token": SCALAR, "tiles": SCALAR},
        {"row_max": None, "PIVOTS": 4, "UNUSED": 16, **SIZES},
    ),
    (
        "_draw",
        {**ROW, **KEYS, **CUT, "order_out": "*i64", "first_token": SCALAR, "tiles": SCALAR},
        {"row_max": None, "moment_out": None, **SIZES},
    ),
    (
        "_reduce",
        {**ROW, **TILES, **OUT, "temperature": "*fp32", "kept_in": "*fp32", "row_max": "*fp32"},
        {"ROW_TILES": 64, **NO_MOMENT},
    ),
    # The same for rows whose entropy is asked for.
    (
        "_tiles",
        {**ROW, **OUT, "moment_out": "*fp32", "first_token": SCALAR},
        {"temperature": None, "TILE": 4096},
    ),
    (
        "_reduce",
        {**ROW, **TILES, **OUT, **MOMENT},
        {"temperature": None, "kept_in": None, "row_max": None, "ROW_TILES": 64},
    ),
    (
        "_draw",
        {**ROW, **KEYS, **CUT, "order_out": "*i64", "moment_out": "*fp32"}
        | {"first_token": SCALAR, "tiles": SCALAR},
        {"row_max": None, **SIZES},
    ),
    (
        "_reduce",
        {**ROW, **TILES, **OUT, **MOMENT}
        | {"temperature": "*fp32", "kept_in": "*fp32", "row_max": "*fp32"},
        {"ROW_TILES": 64},
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, not compiled")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_compiles_for_sm90(case):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_d2f.sampling import confidence_kernel as confidence

    name, types, constants = CASES[case]
    kernel = getattr(confidence, name)
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    assert {arg for arg, kind in signature.items() if kind == "constexpr"} == set(constants)
    values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(ASTSource(kernel, signature, values), target=target)
    assert ".target sm_90" in compiled.asm["ptx"]
