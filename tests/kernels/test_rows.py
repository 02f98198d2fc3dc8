# SPDX-License-Identifier: Apache-2.0
"""The padded list of undecided positions, against `nonzero`."""

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from vllm_d2f.kernels.rows import masked_rows, scatter


@pytest.mark.parametrize("seed", range(20))
def test_equals_nonzero(seed):
    generator = torch.Generator().manual_seed(seed)
    requests, width = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 70))
    masked = torch.rand(requests, width, generator=generator) < seed % 5 / 4  # none .. all
    request, column = masked.nonzero(as_tuple=True)
    count = len(request)
    for bound in {count, requests * width, (count + requests * width) // 2}:
        buffer = torch.full((requests * width + 1,), -7)
        rows = masked_rows(masked, bound, buffer)
        assert rows.target_N.data_ptr() == buffer.data_ptr() or bound == 0
        assert len(rows.request_N) == len(rows.column_N) == bound
        assert torch.equal(rows.request_N[:count], request)
        assert torch.equal(rows.column_N[:count], column)
        # Padding can be read anywhere and is written nowhere.
        assert (rows.request_N < requests).all() and (rows.column_N < width).all()
        values = torch.rand(bound, generator=generator) + 1
        back = scatter(rows, values, (requests, width))
        want = torch.zeros(requests, width)
        want[request, column] = values[:count]
        assert torch.equal(back, want)


def test_waits_for_no_device():
    """Tensors without data: whatever the host would have to read raises."""
    with FakeTensorMode():
        masked = torch.zeros(4, 32, dtype=torch.bool)
        with pytest.raises(DynamicOutputShapeException):
            masked.nonzero()
        rows = masked_rows(masked, 100, torch.empty(129, dtype=torch.int64))
        assert scatter(rows, torch.ones(100), (4, 32)).shape == (4, 32)


def test_a_short_buffer_is_refused():
    with pytest.raises(ValueError, match="buffer"):
        masked_rows(torch.zeros(2, 4, dtype=torch.bool), 8, torch.zeros(8, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_proposing_waits_for_no_device():
    from vllm_d2f.kernels import confidence
    from vllm_d2f.proposal import Sampling

    masked = torch.rand(8, 128, device="cuda") < 0.5
    buffer = torch.empty(8 * 128 + 1, dtype=torch.int64, device="cuda")
    head = torch.randn(256, 32000, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(8 * 128, 256, device="cuda", dtype=torch.bfloat16)
    sampling = Sampling.greedy(8, "cuda")
    sampling.temperature_R[::2], sampling.top_p_R[::4] = 0.7, 0.9
    forward = torch.zeros(8, dtype=torch.int64, device="cuda")

    def step():
        rows = masked_rows(masked, 8 * 128, buffer)
        logits = hidden[rows.request_N * 128 + rows.column_N] @ head
        token, value = confidence.propose(
            logits, 3, sampling.rows(rows.request_N), rows.column_N, forward[rows.request_N]
        )
        return scatter(rows, token, (8, 128)), scatter(rows, value, (8, 128))

    step()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens, values = step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert (values[masked] > 0).all() and (values[~masked] == 0).all()
    assert (tokens[~masked] == 0).all()
