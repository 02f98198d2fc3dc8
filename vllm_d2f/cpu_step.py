# SPDX-License-Identifier: Apache-2.0
"""`d2f.advance` and `d2f.grow` for the CPU, compiled: the same iteration as loops over one row.

On a small batch a vectorised step is a hundred operations on a few hundred numbers, and on a CPU
each costs its launch: about a millisecond a step. Compiled, they are one call. `d2f` says what they
compute and is what these are tested against, on random windows, bit for bit.

Arrays are NumPy views of a `d2f.Window`'s tensors and are changed in place. Shape suffixes: S
slots, D rows that denoise, W window positions, N masked positions in row order, E end tokens.
"""

import numba
import numpy as np

from vllm_d2f.tally import BITS, MOST_NONFINITE, NONFINITE


@numba.njit(cache=True, nogil=True)
def list_masked(slot_D, decided_SW, numbers, request_N, column_N):
    """Write row and column of every undecided open position; return how many there are."""
    n = 0
    for d in range(len(slot_D)):
        slot = slot_D[d]
        for column in range(numbers[slot, 0]):
            if not decided_SW[slot, column]:
                request_N[n] = d
                column_N[n] = column
                n += 1
    return n


@numba.njit(cache=True, nogil=True)
def advance_and_grow(
    slot_D,
    request_N,
    column_N,
    token_N,
    confidence_N,
    mask_id,
    num_ends,
    tokens_SW,
    decided_SW,
    numbers,
    tau_conf_S1,
    draft_SW,
    lagging,
    tokens_DW,
    new_D,
    commit_D,
    tally_D,
):
    """One iteration for the given slots.

    Args:
        request_N, column_N: what `list_masked` wrote.
        token_N, confidence_N: the proposals at these positions.
        draft_SW: receives the next window, -1 beyond the open blocks; if `lagging`, the window
            as this forward decided it, before it moves (`D2FSampler.lagging`), and what is done is
            closed (`d2f.close`).
        tokens_DW, new_D: receive the tokens that leave now, those of `Step.tokens_RW` between
            `Step.sent_R` and `Step.output_R`, and how many they are.
        commit_D: receives `Step.commit_R`.
        tally_D: receives `tally.pack` of the step.
    """
    width = tokens_SW.shape[1]
    confidence_W = np.empty(width, dtype=np.float32)
    n = 0
    for d in range(len(slot_D)):
        slot = slot_D[d]
        tokens_W, decided_W, number = tokens_SW[slot], decided_SW[slot], numbers[slot]
        open_, rest, goal, lead_in = number[0], number[1], number[2], number[5]
        size, max_open, add, act = number[6], number[7], number[8], number[9]
        tau_conf = tau_conf_S1[slot, 0]

        previous, in_active, in_semi, nonfinite = 0, 0, 0, 0
        # Proposals go straight into the window; they count once the position is decided.
        while n < len(request_N) and request_N[n] == d:
            column = column_N[n]
            confidence_W[column] = confidence_N[n]
            nonfinite += confidence_N[n] == 0
            tokens_W[column] = token_N[n]
            n += 1

        for begin in range(0, open_, size):
            end = min(begin + size, open_)
            decided, best, best_column = 0, np.float32(-1.0), -1
            for column in range(begin, end):
                if decided_W[column]:
                    decided += 1
                elif confidence_W[column] >= 0 and confidence_W[column] > best:  # below 0: held
                    best, best_column = confidence_W[column], column
            forced = begin == 0 or previous >= act
            for column in range(begin, end):
                if not decided_W[column]:
                    if confidence_W[column] > tau_conf or (forced and column == best_column):
                        decided_W[column] = True
                        if forced:
                            in_active += 1
                        else:
                            in_semi += 1
                    else:
                        tokens_W[column] = mask_id
            previous = decided

        lead = 0
        while lead < open_ and decided_W[lead]:
            lead += 1
        need, was_open = goal, open_
        found = False
        for column in range(min(open_, goal)):
            if decided_W[column]:
                for e in range(num_ends):
                    if tokens_W[column] == number[10 + e]:
                        found = True
            if found:
                need = column + 1
                rest = min(rest, (column // size + 1) * size)
                open_ = min(open_, rest)
                break
        commit = rest if lead_in >= rest else lead_in // size * size
        new = min(lead, need) - lead_in
        new_D[d], commit_D[d] = new, commit
        tokens_DW[d, :new] = tokens_W[lead_in : lead_in + new]
        dropped = (was_open + size - 1) // size - (open_ + size - 1) // size
        if lagging:
            draft_SW[slot, :width] = tokens_W

        # Move over what was committed, then add.
        open_ = max(open_ - commit, 0)
        for column in range(width):
            if column < open_:
                tokens_W[column] = tokens_W[column + commit]
                decided_W[column] = decided_W[column + commit]
            else:
                tokens_W[column] = mask_id
                decided_W[column] = False
        rest -= commit
        limit = min(rest, max_open)
        if open_ < limit:
            last = (open_ - 1) // size * size  # -size if none is open
            in_last = 0
            for column in range(max(last, 0), open_):
                in_last += decided_W[column]
            if open_ == 0 or in_last >= add:
                open_ = min(last + 2 * size, limit)
        number[0], number[1], number[2] = open_, rest, goal - commit
        number[3] += commit
        number[4] += 1
        number[5] = lead - commit
        if lagging:
            if lead >= need:  # `d2f.close`
                number[0] = number[1] = number[5] = 0
                decided_W[:] = False
        else:
            for column in range(width):
                draft_SW[slot, column] = tokens_W[column] if column < open_ else -1
        tally_D[d] = (
            in_active
            | in_semi << BITS
            | dropped << (2 * BITS)
            | number[0] << (3 * BITS)
            | min(nonfinite, MOST_NONFINITE) << NONFINITE
        )
