# SPDX-License-Identifier: Apache-2.0
"""The compiled step against the vectorised one it stands for: every number the same."""

import pytest
import torch

from vllm_d2f.d2f import D2FParams, Window, advance, close, grow

numba = pytest.importorskip("numba", reason="vLLM's CPU build brings Numba")
from vllm_d2f.cpu_step import advance_and_grow, list_masked  # noqa: E402
from vllm_d2f.tally import pack, unpack  # noqa: E402

MASK, VOCAB, SLOTS, WIDTH, ENDS = 0, 7, 9, 24, 3


def start_random(windows, row, generator):
    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    params = D2FParams(
        pick(1, 2, 3, 4, 6, 8),
        pick(1, 2, 3),
        pick(0, 0.1, 0.5, 1),
        pick(0, 0.5, 0.95),
        pick(0, 0.5, 0.9, 1),
    )
    arguments = dict(
        max_tokens=pick(1, 5, 13, 24, 60),
        limit=pick(3, 17, 80),
        ends=[[], [5], [5, 6, 1]][pick(0, 1, 2)],
    )
    for window in windows:
        window.start(row, params, mask_id=MASK, **arguments)


@pytest.mark.parametrize("lagging", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_equals_d2f(seed, lagging):
    generator = torch.Generator().manual_seed(seed)
    plain, compiled = (Window.empty(SLOTS, WIDTH, ENDS, MASK) for _ in range(2))
    for row in range(SLOTS):
        start_random((plain, compiled), row, generator)
    everyone = torch.arange(SLOTS)
    for window in (plain, compiled):
        rows = window.rows(everyone)
        grow(rows)
        window.put(everyone, rows)
    draft = torch.full((SLOTS, WIDTH), -7)
    request_N, column_N = (torch.empty(SLOTS * WIDTH, dtype=torch.int64) for _ in range(2))
    for _ in range(40):
        slot_D = torch.randperm(SLOTS, generator=generator)[
            : int(torch.randint(1, SLOTS, (), generator=generator))
        ]
        rows = plain.rows(slot_D)
        masked = (rows.column_W < rows.open_R[:, None]) & ~rows.decided_RW
        proposal = torch.randint(1, VOCAB, (len(slot_D), WIDTH), generator=generator)
        # Few levels, so that equal confidences and exact thresholds occur.
        # Negative ones are held.
        confidence = torch.randint(-3, 11, (len(slot_D), WIDTH), generator=generator).float() / 10
        step = advance(rows, proposal, confidence, MASK)
        grow(rows)
        if lagging:
            close(rows, step.done_R)
        plain.put(slot_D, rows)

        count = list_masked(
            slot_D.numpy(),
            compiled.decided_RW.numpy(),
            compiled.numbers.numpy(),
            request_N.numpy(),
            column_N.numpy(),
        )
        request, column = request_N[:count], column_N[:count]
        assert torch.equal(torch.stack((request, column), 1), masked.nonzero())
        tokens = torch.empty(len(slot_D), WIDTH, dtype=torch.int64)
        new, commit, tally = torch.empty(3, len(slot_D), dtype=torch.int64)
        advance_and_grow(
            slot_D.numpy(),
            request.numpy(),
            column.numpy(),
            proposal[request, column].numpy(),
            confidence[request, column].numpy(),
            MASK,
            compiled.num_ends,
            compiled.tokens_RW.numpy(),
            compiled.decided_RW.numpy(),
            compiled.numbers.numpy(),
            compiled.tau_conf_R1.numpy(),
            draft.numpy(),
            lagging,
            tokens.numpy(),
            new.numpy(),
            commit.numpy(),
            tally.numpy(),
        )
        assert torch.equal(new, step.output_R - step.sent_R)
        assert torch.equal(commit, step.commit_R)
        active = step.accepted_RW & step.active_RW
        semi = step.accepted_RW & ~step.active_RW
        zero = (masked & (confidence == 0)).sum(1)
        counts = (active.sum(1), semi.sum(1), step.dropped_R, rows.open_R, zero)
        assert torch.equal(tally, pack(*counts))
        assert [unpack(t).dropped for t in tally.tolist()] == step.dropped_R.tolist()
        assert [unpack(t).open for t in tally.tolist()] == rows.open_R.tolist()
        for d, (sent, count) in enumerate(zip(step.sent_R.tolist(), new.tolist(), strict=True)):
            assert torch.equal(tokens[d, :count], step.tokens_RW[d, sent : sent + count])
        for name in ("tokens_RW", "decided_RW", "numbers"):
            assert torch.equal(getattr(compiled, name), getattr(plain, name)), name
        open_RW = rows.column_W < rows.open_R[:, None]
        query = step.tokens_RW if lagging else torch.where(open_RW, rows.tokens_RW, -1)
        assert torch.equal(draft[slot_D], query)
        # Finished rows make room for new requests, as slots do. Scheduled ahead, some of them see
        # another forward first, in which nothing happens.
        finished = slot_D[step.done_R].tolist()
        if lagging:
            assert not (step.output_R - step.sent_R < 0).any()
            finished = finished[1:]
        for slot in finished:
            start_random((plain, compiled), slot, generator)
            row = torch.tensor([slot])
            for window in (plain, compiled):
                fresh = window.rows(row)
                grow(fresh)
                window.put(row, fresh)
