# SPDX-License-Identifier: Apache-2.0
"""The padded list of masked positions, against `nonzero`."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from vllm_d2f.worker.masked_rows import bounded_rows, exact_rows, scatter


@pytest.mark.parametrize("seed", range(20))
def test_equals_nonzero(seed):
    generator = torch.Generator().manual_seed(seed)
    requests, width = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 70))
    masked = torch.rand(requests, width, generator=generator) < seed % 5 / 4  # none .. all
    exact = masked.sum(1).numpy()
    some = exact + (np.random.default_rng(seed).random(requests) * (width - exact)).astype(int)
    for bound in (exact, np.full(requests, width), some):
        multiple = (1, 16)[seed % 2]
        buffer = torch.full((requests * width + multiple + 1,), -7)
        rows = bounded_rows(masked, bound, multiple, buffer)
        assert rows.target_N.data_ptr() == buffer.data_ptr()
        num_rows = len(rows.request_N)
        assert num_rows == -(-max(bound.sum(), 1) // multiple) * multiple
        assert len(rows.column_N) == len(rows.target_N) == num_rows
        values = torch.rand(num_rows, generator=generator) + 1
        want, end = torch.zeros(requests, width), bound.cumsum()
        for d in range(requests):
            begin = end[d] - bound[d]
            column = masked[d].nonzero()[:, 0]
            assert torch.equal(rows.column_N[begin : begin + exact[d]], column)
            assert (rows.request_N[begin : end[d]] == d).all()
            want[d, column] = values[begin : begin + exact[d]]
        assert (rows.request_N[end[-1] :] == requests - 1).all()
        # Padding reads its request's first position and is written nowhere.
        padding = rows.target_N == requests * width
        assert int(padding.sum()) == num_rows - exact.sum() and not rows.column_N[padding].any()
        assert torch.equal(scatter(rows, values, (requests, width)), want)
    rows = exact_rows(masked)
    assert torch.equal(torch.stack(rows[:2], 1), masked.nonzero())
    assert torch.equal(scatter(rows, masked[masked], (requests, width)), masked)


def test_waits_for_no_device():
    """Tensors without data: whatever the host would have to read raises."""
    with FakeTensorMode():
        masked = torch.zeros(4, 32, dtype=torch.bool)
        with pytest.raises(DynamicOutputShapeException):
            exact_rows(masked)
        bound = np.array([32, 20, 16, 32])
        rows = bounded_rows(masked, bound, 4, torch.empty(129, dtype=torch.int64))
        assert scatter(rows, torch.ones(100), (4, 32)).shape == (4, 32)


def test_a_short_buffer_is_refused():
    with pytest.raises(ValueError, match="buffer"):
        masked = torch.zeros(2, 4, dtype=torch.bool)
        bounded_rows(masked, np.array([4, 4]), 1, torch.zeros(8, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_waits_for_no_device():
    from vllm_d2f.sampling import confidence_kernel as confidence
    from vllm_d2f.sampling.sample import Sampling

    masked = torch.rand(8, 128, device="cuda") < 0.5
    bound, buffer = np.full(8, 128), torch.empty(8 * 128 + 1, dtype=torch.int64, device="cuda")
    head = torch.randn(256, 32000, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(8 * 128, 256, device="cuda", dtype=torch.bfloat16)
    sampling = Sampling.greedy(8, "cuda")
    sampling.temperature_R[::2], sampling.top_p_R[::4] = 0.7, 0.9
    forward = torch.zeros(8, dtype=torch.int64, device="cuda")

    def step():
        rows = bounded_rows(masked, bound, 16, buffer)
        logits = hidden[rows.request_N * 128 + rows.column_N] @ head
        token, value = confidence.sample(
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
