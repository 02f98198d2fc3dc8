# SPDX-License-Identifier: Apache-2.0
"""numpy versions of Triton kernels of vLLM's V2 model runner, and of three methods (used by p03).

Each function has the parameters of what it replaces, computes the whole grid of a kernel at once,
and writes into the same tensors through numpy views (`Tensor.numpy()` shares memory). A step
touches a few hundred integers, for which a numpy call costs about a microsecond and a torch call
about five.

Row and token layout follow vLLM: `idx_mapping[b]` is the state row of batch row `b`, and the tokens
of batch row `b` are `query_start_loc[b]:query_start_loc[b + 1]`. Strides and block sizes are in the
signatures because the launch passes them; numpy views do not need them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor

PAD_SLOT_ID = -1  # vllm.v1.attention.backends.utils.PAD_SLOT_ID; a test compares


def spread(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row, and the offset in that row, of each element of ragged rows.

    `spread([2, 0, 3])` is `([0, 0, 2, 2, 2], [0, 1, 0, 1, 2])`.
    """
    row = np.arange(len(lengths)).repeat(lengths)
    before = (lengths.cumsum() - lengths).repeat(lengths)
    return row, np.arange(len(row)) - before


def prepare_prefill_inputs(
    input_ids_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Copy known tokens into the input of rows that are still in their prompt."""
    state = idx_mapping_ptr.numpy()
    prefill_len = prefill_lens_ptr.numpy()[state]
    computed = num_computed_tokens_ptr.numpy()[state]
    prefilling = (computed < prefill_len).nonzero()[0]
    if not len(prefilling):
        return
    state, prefill_len, computed = state[prefilling], prefill_len[prefilling], computed[prefilling]
    start = query_start_loc_ptr.numpy()[prefilling]
    length = query_start_loc_ptr.numpy()[prefilling + 1] - start
    tokens = all_token_ids_ptr.numpy()

    row, offset = spread(length)
    input_ids_ptr.numpy()[start[row] + offset] = tokens[state[row], computed[row] + offset]

    # The tokens that follow this chunk, or 0 beyond the end of the prompt.
    position = computed + length + np.arange(num_lookahead)[:, None]
    inside = position < prefill_len
    ahead = tokens[state, np.where(inside, position, 0)]
    next_prefill_tokens_ptr.numpy()[:num_lookahead, state] = np.where(inside, ahead, 0)


def prepare_pos_seq_lens(
    pos_ptr: Tensor,
    seq_lens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Write the positions of all tokens, and the sequence lengths (0 in unused rows)."""
    state = idx_mapping_ptr.numpy()
    num_reqs = len(state)
    bounds = query_start_loc_ptr.numpy()[: num_reqs + 1]
    length = bounds[1:] - bounds[:-1]
    computed = num_computed_tokens_ptr.numpy()[state]

    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:num_reqs] = computed + length
    seq_lens[num_reqs:max_num_reqs] = 0

    row, offset = spread(length)
    pos_ptr.numpy()[bounds[0] : bounds[-1]] = computed[row] + offset


def combine_sampled_and_draft_tokens(
    input_ids_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    prefill_len_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: Tensor,
    logits_indices_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Put the last sampled and the draft tokens into the input, and list the rows to sample from.

    For a D2F model `NUM_NEW_SAMPLED_TOKENS` is 0 and the draft tokens are the window.
    """
    state = idx_mapping_ptr.numpy()
    num_reqs = len(state)
    end = query_start_loc_ptr.numpy()[1 : num_reqs + 1]
    bounds = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_logits = bounds[1:] - bounds[:-1]
    first_logit = end - num_logits

    row, offset = spread(num_logits)
    slot = first_logit[row] + offset
    logits_indices_ptr.numpy()[bounds[0] : bounds[-1]] = slot

    input_ids = input_ids_ptr.numpy()
    seq_len = seq_lens_ptr.numpy()[:num_reqs]
    prefill_len = prefill_len_ptr.numpy()[state]
    decoding = seq_len > prefill_len
    if NUM_NEW_SAMPLED_TOKENS > 0:
        # A prompt token keeps its place when the logits reach back into the prompt.
        write = (decoding & (seq_len - num_logits >= prefill_len)).nonzero()[0]
        last = last_sampled_tokens_ptr.numpy().reshape(-1)
        input_ids[first_logit[write]] = last[state[write]]
    if NUM_NEW_SAMPLED_TOKENS > 0 or not decoding.all():
        draft = decoding[row] & (offset >= NUM_NEW_SAMPLED_TOKENS)
        row, offset, slot = row[draft], offset[draft], slot[draft]
    input_ids[slot] = draft_tokens_ptr.numpy()[state[row], offset - NUM_NEW_SAMPLED_TOKENS]


def post_update(
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    output_bin_counts_ptr: Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor | None,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    draft_tokens_ptr: Tensor | None = None,
    draft_tokens_out_ptr: Tensor | None = None,
    num_draft_tokens: int = 0,
    *,
    num_warps: int = 1,
) -> None:
    """Append the committed tokens of each row and advance its count of computed tokens.

    vLLM 0.33 added the draft tokens, which are copied from batch rows to state rows.
    """
    state = idx_mapping_ptr.numpy()
    sampled = num_sampled_ptr.numpy()[: len(state)]
    delta = -num_rejected_ptr.numpy()[: len(state)]
    if query_start_loc_ptr is not None:
        bounds = query_start_loc_ptr.numpy()[: len(state) + 1]
        delta = delta + (bounds[1:] - bounds[:-1])

    known = state >= 0  # a negative index marks a row to skip
    if not known.all():
        state, delta = state[known], delta[known]
    if draft_tokens_ptr is not None and draft_tokens_out_ptr is not None:
        draft_tokens_out_ptr.numpy()[state] = draft_tokens_ptr.numpy()[: len(known)][known]
    num_computed_tokens_ptr.numpy()[state] += delta

    batch_row = (known & (sampled > 0)).nonzero()[0]
    if not len(batch_row):
        return
    state, sampled = idx_mapping_ptr.numpy()[batch_row], sampled[batch_row]
    tokens = sampled_tokens_ptr.numpy()
    total_len = total_len_ptr.numpy()
    start = total_len[state]

    row, offset = spread(sampled)
    new = tokens[batch_row[row], offset]
    all_token_ids_ptr.numpy()[state[row], start[row] + offset] = new
    if output_bin_counts_ptr is not None:
        np.add.at(output_bin_counts_ptr.numpy(), (state[row], new), 1)
    last_sampled_tokens_ptr.numpy().reshape(-1)[state] = tokens[batch_row, sampled - 1]
    total_len[state] = start + sampled


def expand_idx_mapping(
    idx_mapping_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Write for each logit the state row of its request, and its index among that request's."""
    state = idx_mapping_ptr.numpy()
    bounds = cu_num_logits_ptr.numpy()[: len(state) + 1]
    row, offset = spread(bounds[1:] - bounds[:-1])
    expanded_idx_mapping_ptr.numpy()[bounds[0] : bounds[-1]] = state[row]
    expanded_local_pos_ptr.numpy()[bounds[0] : bounds[-1]] = offset


def apply_write(
    output_ptr: Tensor,
    output_stride: int,
    write_indices_ptr: Tensor,
    write_starts_ptr: Tensor,
    write_contents_ptr: Tensor,
    write_cu_lens_ptr: Tensor,
    write_group_ids_ptr: Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Write staged pieces: piece `i` into row `write_indices[i]`, from `write_starts[i]` on.

    The variant for several KV cache groups gets raw pointers; `apply` replaces its only caller.
    """
    assert not MULTI_GROUP
    length = np.diff(write_cu_lens_ptr.numpy(), prepend=0)
    row, offset = spread(length)
    # int64 before the product: row times stride exceeds int32 for long contexts.
    base = write_indices_ptr.numpy().astype(np.int64) * output_stride + write_starts_ptr.numpy()
    output_ptr.view(-1).numpy()[base[row] + offset] = write_contents_ptr.numpy()[: len(row)]


def gather_block_tables(
    self: "BlockTables",
    idx_mapping: Tensor,
    num_reqs_padded: int,
    out: tuple[Tensor, ...] | None = None,
    out_ptrs: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the block tables of the batch rows; padded rows are zero.

    As in the kernel, the entries behind a request's last block keep values of earlier steps.
    vLLM 0.33 added `num_computed_tokens`, for sliding windows, which no D2F model has.
    """
    state = idx_mapping.numpy()
    num_reqs = len(state)
    targets = tuple(self.input_block_tables) if out is None else out
    num_blocks = self.num_blocks.gpu.numpy()
    for group, target in enumerate(targets):
        width = num_blocks[group, state].max(initial=0)
        table = target.numpy()
        table[:num_reqs, :width] = self.block_tables[group].gpu.numpy()[state, :width]
        table[num_reqs:num_reqs_padded] = 0
    return tuple(target[:num_reqs_padded] for target in targets)


def compute_slot_mappings(
    self: "BlockTables",
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    num_tokens_padded: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return the KV cache slot of each token: PAD behind the last token and in unused rows."""
    if self.cp_size != 1:
        raise NotImplementedError("context parallelism has no CPU version in vllm-d2f")
    result = self.slot_mappings if out is None else out
    slots = result.numpy()
    state = idx_mapping.numpy()
    bounds = query_start_loc.numpy()[: len(state) + 1]
    first, last = bounds[0], bounds[-1]
    owner = state.repeat(bounds[1:] - bounds[:-1])
    position = positions.numpy()[first:last]
    enabled = self.slot_mapping_enabled.numpy()
    for group, size in enumerate(self.block_sizes):
        slots[group, first:] = PAD_SLOT_ID
        if enabled[group]:
            block = position // size
            # An unused row has a negative owner: it reads another request's table, and keeps PAD.
            number = self.block_tables[group].gpu.numpy()[owner, block]
            # number * size + position % size, without a second division.
            slot = (number - block) * size + position
            slots[group, first:last] = np.where(owner < 0, PAD_SLOT_ID, slot)
    return result[:, :num_tokens_padded]


def apply(
    self: "FusedStagedWriter",
    tensors: Sequence["StagedWriteTensor"],
    output_ptrs: Tensor,
    output_strides: Tensor,
) -> None:
    """Write and clear each tensor's staged pieces; one launch for all is no faster on a CPU."""
    for tensor in tensors:
        tensor.apply_write()
