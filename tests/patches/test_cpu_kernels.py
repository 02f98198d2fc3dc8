# SPDX-License-Identifier: Apache-2.0
"""Each CPU stand-in against the Triton kernel of the installed vLLM, on random batches."""

import inspect
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton_emulator import launch
from vllm_d2f.patches import cpu_kernels
from vllm_d2f.patches.p03_cpu_kernels import KERNELS, replacement
from vllm_d2f.patches.patch import find, function_of

SEEDS = range(int(os.environ.get("D2F_KERNEL_SEEDS", "25")))
TARGETS = {replacement(target).__name__: target for target in KERNELS}
TABLES = "vllm.v1.worker.gpu.block_table"
ROWS, MAX_LEN, MAX_TOKENS, MAX_DRAFT = 9, 96, 200, 16


class Batch:
    """A random batch: some requests in their prompt, some decoding, some at the border."""

    def __init__(self, seed: int, shortest: int = 0):
        self.rng = rng = np.random.default_rng(seed)
        self.num_reqs = n = int(rng.integers(1, ROWS + 1))
        self.idx_mapping = torch.from_numpy(rng.permutation(ROWS)[:n].astype(np.int64))
        low = shortest if seed % 3 == 0 else 1
        self.length = rng.integers(low, 20, n).astype(np.int32)
        self.query_start_loc = torch.zeros(ROWS + 1, dtype=torch.int32)
        self.query_start_loc[1 : n + 1] = torch.from_numpy(self.length.cumsum())
        self.query_start_loc[n + 1 :] = self.query_start_loc[n]
        self.num_tokens = int(self.length.sum())
        self.prefill_len = self.ints(1, 40, ROWS)
        self.num_computed = self.ints(0, 60, ROWS)
        self.all_token_ids = self.ints(0, 99, ROWS, MAX_LEN)
        self.input_ids = self.ints(0, 99, MAX_TOKENS)

    def ints(self, low: int, high: int, *shape: int, dtype: Any = np.int32) -> torch.Tensor:
        return torch.from_numpy(self.rng.integers(low, high, shape).astype(dtype))

    def bounds(self, lengths: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


def compare(name: str, grid: tuple[int, ...], args: tuple[Any, ...], **options: Any) -> None:
    """Run kernel and stand-in on copies of the same arguments; all tensors must end up equal."""
    copies = [
        tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args) for _ in range(2)
    ]
    launch(TARGETS[name], grid, *copies[0], **options)
    vars(cpu_kernels)[name](*copies[1], **options)
    for position, (want, got) in enumerate(zip(*copies, strict=True)):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=f"argument {position}")


@pytest.mark.parametrize("num_lookahead", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_prefill_inputs(seed: int, num_lookahead: int):
    b = Batch(seed)
    ahead = b.ints(0, 99, num_lookahead, ROWS)
    compare(
        "prepare_prefill_inputs",
        (b.num_reqs,),
        (b.input_ids, ahead, ROWS, num_lookahead, b.idx_mapping, b.query_start_loc)
        + (b.all_token_ids, MAX_LEN, b.prefill_len, b.num_computed),
        BLOCK_SIZE=8,
        LOOKAHEAD_BLOCK=4,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_pos_seq_lens(seed: int):
    b = Batch(seed)
    pos, seq_lens = b.ints(0, 99, MAX_TOKENS, dtype=np.int64), b.ints(0, 99, ROWS)
    compare(
        "prepare_pos_seq_lens",
        (b.num_reqs + 1,),
        (pos, seq_lens, b.idx_mapping, b.query_start_loc, b.num_computed, ROWS),
        BLOCK_SIZE=8,
    )


@pytest.mark.parametrize("new_tokens", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_combine_sampled_and_draft_tokens(seed: int, new_tokens: int):
    b = Batch(seed, shortest=new_tokens)
    most = np.minimum(b.length, MAX_DRAFT + new_tokens)
    # Like vLLM: as many logits as draft tokens, plus the bonus token, within the scheduled tokens.
    logits = b.rng.integers(np.minimum(new_tokens, most), most + 1)
    seq_lens = b.num_computed[b.idx_mapping] + torch.from_numpy(b.length)
    compare(
        "combine_sampled_and_draft_tokens",
        (b.num_reqs,),
        (b.input_ids, b.idx_mapping, b.ints(0, 99, ROWS, 1, dtype=np.int64), b.query_start_loc)
        + (seq_lens, b.prefill_len, b.ints(0, 99, ROWS, MAX_DRAFT, dtype=np.int64), MAX_DRAFT)
        + (b.bounds(logits), torch.full((int(logits.sum()),), -7)),
        BLOCK_SIZE=32,
        NUM_NEW_SAMPLED_TOKENS=new_tokens,
    )


@pytest.mark.parametrize("bins", [False, True])
@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_post_update(seed: int, with_queries: bool, bins: bool):
    b = Batch(seed)
    if seed % 2:
        b.idx_mapping[b.rng.random(b.num_reqs) < 0.3] = -1
    sampled = b.ints(0, 5, b.num_reqs)
    rejected = b.ints(0, 4, b.num_reqs)
    counts = b.ints(0, 9, ROWS, 12) if bins else None
    compare(
        "post_update",
        (b.num_reqs,),
        (b.idx_mapping, b.num_computed, b.ints(0, 9, ROWS, 1, dtype=np.int64), counts, 12)
        + (b.ints(0, 12, b.num_reqs, 6, dtype=np.int64), 6, sampled, rejected)
        + (b.query_start_loc if with_queries else None, b.all_token_ids, MAX_LEN)
        + (b.ints(0, 60, ROWS), *newer_than_0_32(b, "draft_tokens_ptr")),
        num_warps=1,
    )


def has_parameter(kernel: str, name: str) -> bool:
    return name in inspect.signature(function_of(find("p03", kernel)[2])).parameters


def newer_than_0_32(b: Batch, name: str) -> tuple[Any, ...]:
    """Draft tokens, for a `_post_update_kernel` that has a place for them (vLLM 0.33)."""
    if not has_parameter(TARGETS["post_update"], name):
        return ()
    if b.rng.random() < 0.5:
        return None, None, 0
    shape = [(b.num_reqs, MAX_DRAFT), (ROWS, MAX_DRAFT)]
    return *(b.ints(0, 12, *size, dtype=np.int64) for size in shape), MAX_DRAFT


def test_post_update_moves_draft_tokens():
    """What vLLM 0.33 asks for, on any version: batch row 0 is skipped, row 1 is state row 2."""
    draft, out = torch.tensor([[7, 8], [5, 6]]), torch.zeros(4, 2, dtype=torch.int64)
    nothing = torch.zeros(2, dtype=torch.int32)
    states = (torch.zeros(4, dtype=torch.int32) for _ in range(2))
    cpu_kernels.post_update(
        torch.tensor([-1, 2]), next(states), torch.zeros(4, 1, dtype=torch.int64), None, 0,
        torch.zeros(2, 1, dtype=torch.int64), 1, nothing, nothing, None,
        torch.zeros(4, 9, dtype=torch.int32), 9, next(states), draft, out, 2,
    )  # fmt: skip
    assert out.tolist() == [[0, 0], [0, 0], [5, 6], [0, 0]]


@pytest.mark.parametrize("seed", SEEDS)
def test_expand_idx_mapping(seed: int):
    b = Batch(seed)
    total = b.num_tokens + 3  # longer than needed: the rest stays as it is
    compare(
        "expand_idx_mapping",
        (b.num_reqs,),
        (b.idx_mapping, b.ints(0, 9, total, dtype=np.int64), b.ints(0, 9, total))
        + (b.bounds(b.length),),
        BLOCK_SIZE=32,
    )


@pytest.mark.parametrize("two_dimensions", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_apply_write(seed: int, two_dimensions: bool):
    b = Batch(seed)
    length = b.length if two_dimensions else np.ones_like(b.length)
    output = b.all_token_ids if two_dimensions else b.num_computed
    starts = b.ints(0, 20, b.num_reqs) if two_dimensions else torch.zeros(b.num_reqs).int()
    # A program per piece; since vLLM 0.33 one per 8 tokens of it, given as the second axis.
    compare(
        "apply_write",
        (b.num_reqs, -(-int(length.max()) // 8)),
        (output, output.stride(0), b.idx_mapping.int(), starts, b.ints(0, 99, int(length.sum())))
        + (torch.from_numpy(length.cumsum().astype(np.int32)), None),
        BLOCK_SIZE=8,
        MULTI_GROUP=False,
    )


def test_later_piece_wins_in_a_staged_write():
    """The kernel leaves the order of overlapping pieces open; a stand-in must have a fixed one."""
    row = torch.zeros(8, dtype=torch.int32)
    pieces = [torch.tensor(x, dtype=torch.int32) for x in ([2, 2], [0, 0], [4, 5], [1, 2])]
    cpu_kernels.apply_write(row, 1, *pieces, None, 8, False)
    assert row.tolist() == [0, 0, 5, 0, 0, 0, 0, 0]


def tables(b: Batch, groups: int) -> Any:
    """Return what the two methods read of vLLM's `BlockTables`."""
    sizes = [16, 32][:groups]
    shapes = [-(-MAX_LEN // size) for size in sizes]
    return SimpleNamespace(
        cp_size=1,
        block_sizes=sizes,
        input_block_tables=[b.ints(0, 9, ROWS, n) for n in shapes],
        block_tables=[SimpleNamespace(gpu=b.ints(0, 50, ROWS, n)) for n in shapes],
        num_blocks=SimpleNamespace(gpu=b.ints(0, min(shapes) + 1, groups, ROWS)),
        slot_mappings=b.ints(0, 9, groups, MAX_TOKENS, dtype=np.int64),
        slot_mapping_enabled=torch.tensor([True, False][:groups]),
    )


@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_gather_block_tables(seed: int, groups: int, given_out: bool):
    b = Batch(seed)
    t = tables(b, groups)
    padded = min(ROWS, b.num_reqs + 2)
    want = [x.clone() for x in t.input_block_tables]
    newer = has_parameter(f"{TABLES}:_gather_block_tables_kernel", "sliding_window_reach_ptr")
    no_sliding_window = (b.num_computed, b.ints(0, 1, groups), torch.tensor(t.block_sizes)) * newer
    launch(
        f"{TABLES}:_gather_block_tables_kernel",
        (groups, padded),
        b.idx_mapping,
        [x.gpu for x in t.block_tables],
        want,
        torch.tensor([x.stride(0) for x in want]),
        t.num_blocks.gpu,
        ROWS,
        b.num_reqs,
        *no_sliding_window,
        BLOCK_SIZE=4,
        **({"MASK_SLIDING_WINDOW": False} if no_sliding_window else {}),
    )
    out = tuple(x.clone() for x in t.input_block_tables) if given_out else None
    got = cpu_kernels.gather_block_tables(t, b.idx_mapping, padded, out)
    for group, (w, g) in enumerate(zip(want, got, strict=True)):
        assert g.data_ptr() == (out or t.input_block_tables)[group].data_ptr()
        assert g.shape[0] == padded
        for row, state in enumerate(b.idx_mapping.tolist()):
            filled = t.num_blocks.gpu[group, state]
            assert torch.equal(g[row, :filled], w[row, :filled])
        assert torch.equal(g[b.num_reqs :], w[b.num_reqs : padded])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_compute_slot_mappings(seed: int, groups: int):
    b = Batch(seed)
    t = tables(b, groups)
    positions = b.ints(0, MAX_LEN, MAX_TOKENS, dtype=np.int64)
    if seed % 2:
        b.idx_mapping[b.rng.random(b.num_reqs) < 0.3] = -1
    want = t.slot_mappings.clone()
    launch(
        f"{TABLES}:_compute_slot_mappings_kernel",
        (groups, b.num_reqs + 1),
        MAX_TOKENS,
        b.idx_mapping,
        b.query_start_loc,
        positions,
        [x.gpu for x in t.block_tables],
        torch.tensor([x.gpu.stride(0) for x in t.block_tables]),
        torch.tensor(t.block_sizes),
        t.slot_mapping_enabled,
        torch.tensor([True] * groups),
        want,
        MAX_TOKENS,
        0,
        CP_SIZE=1,
        CP_INTERLEAVE=1,
        PAD_ID=cpu_kernels.PAD_SLOT_ID,
        TRITON_BLOCK_SIZE=8,
    )
    got = cpu_kernels.compute_slot_mappings(
        t, b.idx_mapping, b.query_start_loc, positions, b.num_tokens
    )
    assert torch.equal(t.slot_mappings, want)
    assert got.shape == (groups, b.num_tokens) and got.data_ptr() == t.slot_mappings.data_ptr()


def test_context_parallelism_is_refused():
    t = tables(Batch(1), 1)
    t.cp_size = 2
    with pytest.raises(NotImplementedError, match="context parallelism"):
        cpu_kernels.compute_slot_mappings(t, *[torch.zeros(1)] * 3, 1)


def test_fused_writer_writes_every_tensor():
    written = []
    tensors = [SimpleNamespace(apply_write=lambda i=i: written.append(i)) for i in range(3)]
    cpu_kernels.apply(None, tensors, None, None)
    assert written == [0, 1, 2]


def test_pad_slot_is_vllms():
    from vllm.v1.attention.backends.utils import PAD_SLOT_ID

    assert cpu_kernels.PAD_SLOT_ID == PAD_SLOT_ID
