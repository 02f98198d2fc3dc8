# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks as threads that take turns, and a gather between them.

One thread runs at a time: Triton's interpreter is not made for more.
"""

import threading

import torch


def run_ranks(count, work):
    """Return the results of `work(rank, gather)`, by rank; `gather` stacks each rank's values."""
    board, results, errors = [None] * count, [None] * count, []
    barrier, turn = threading.Barrier(count, timeout=120), threading.Lock()

    def wait():
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()

    def run(rank):
        def gather(values):
            board[rank] = values
            wait()
            out = torch.stack(board)
            wait()
            return out

        try:
            with turn:
                results[rank] = work(rank, gather)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
