# SPDX-License-Identifier: Apache-2.0
"""Hashes of pages that hold tokens of an answer, for models with block-causal prompts.

A page of prompt tokens alone may be shared by all prompts that begin like it. In the answer blocks
begin where the prompt ends, so keys and values depend on where that is: a prompt that continues
with the answer of another must not find the answer's pages. From the first page with a token of the
answer on, hashes include the prompt's length; later ones are chained to it.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    Hasher = Callable[[Request], list[BlockHash]]
    """The hashes of a request's pages that are full and have none yet."""


def mark_answers(hasher: "Hasher", page: int) -> "Hasher":
    """A hasher that includes the prompt's length; `page` is positions per hash."""

    def marked(request: "Request") -> "list[BlockHash]":
        known, hashes = len(request.block_hashes), hasher(request)
        first = request.num_prompt_tokens // page - known
        if not 0 <= first < len(hashes):
            return hashes
        text = f"|prompt:{request.num_prompt_tokens}"
        own = hashlib.sha256(hashes[first] + text.encode()).digest()
        hashes[first:] = [type(hashes[first])(own)]
        request.block_hashes += hashes
        rest = hasher(request)
        del request.block_hashes[known:]
        return hashes + rest

    return marked
