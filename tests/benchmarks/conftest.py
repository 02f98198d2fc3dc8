# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks' tests share."""

import shutil

import pytest


@pytest.fixture
def broken_model(tmp_path):
    """d2f-tiny with the rows of its language-model head in another order: it must score low."""
    import torch
    from safetensors.torch import load_file, save_file

    from vllm_d2f.hub.names import resolve

    folder = tmp_path / "broken" / "d2f-tiny"
    shutil.copytree(resolve("d2f-tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] = head[order].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
