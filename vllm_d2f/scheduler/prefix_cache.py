# SPDX-License-Identifier: Apache-2.0
"""Which requests may share pages of the KV cache.

vLLM shares a page between requests whose tokens agree up to its end, because in a causal model its
keys and values depend on nothing else. In a D2F model they also depend on where blocks begin and
end, so a salt, or a hash, tells apart what vLLM would take for the same page.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    from vllm_d2f.settings import Settings

    Hasher = Callable[[Request], list[BlockHash]]
    """Returns the hashes of a request's full pages that have none yet."""


def separate_pages(
    request: "Request", settings: "Settings", block_size: int, page: int, hash_page: int
) -> None:
    """Salt a new request, so that it shares only pages with the same keys and values.

    Args:
        block_size: of the request. A committed block depends on how the answer is cut into blocks.
        page: positions per page of the KV cache.
        hash_page: positions per hash.
    """
    salt = f"{request.cache_salt or ''}|d2f:{block_size}"
    if settings.block_origin == "zero":
        # Blocks begin at multiples of the block size, so a page that ends with a block depends on
        # the tokens up to its end alone, in the prompt and in the answer. Another page may be
        # written while a block at its end is still denoised; it is shared with no request.
        salt += "|zero"
        if page % block_size:
            salt += f"|{request.request_id}"
    elif settings.prompt_attention == "bidirectional" or page % settings.params.block_size:
        # The keys and values of a prompt depend on all of it. The same holds for a page of a
        # block-causal prompt that does not end with a block.
        tokens = ",".join(map(str, request.prompt_token_ids or ()))
        salt += "|" + hashlib.sha256(tokens.encode()).hexdigest()
    elif request._block_hasher is not None:
        request._block_hasher = mark_answers(request._block_hasher, hash_page)
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()


def mark_answers(hasher: "Hasher", page: int) -> "Hasher":
    """Return a hasher that puts the prompt's length into the hashes of answer pages.

    Prompts that begin alike may share pages of prompt tokens. The blocks of an answer begin where
    the prompt ends, so its keys and values depend on where that is: a prompt that continues with
    the answer of another request must not find the pages of that answer. The first page with a
    token of the answer gets the prompt's length, and vLLM chains the hashes of later pages to it.

    Args:
        page: positions per hash.
    """

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
