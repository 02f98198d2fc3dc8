# SPDX-License-Identifier: Apache-2.0
"""Attention masks of a batch, in the form each implementation takes.

The rule itself is `vllm_d2f.d2f.may_attend`, the one that serving uses.

Shapes: B rows, T tokens (Q as query, K as key).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from training.data import Batch
from vllm_d2f.d2f import may_attend

Rule = Literal["causal", "full", "block_causal"]


def allowed(
    batch: Batch,
    rule: Rule,
    block_size: int = 1,
    prompt_block: int | None = None,
    block_origin: str = "prompt_end",
) -> Tensor:
    """Return which position attends to which, bool (B, Q, K): itself, and by `rule` its document.

    Args:
        block_size, prompt_block, block_origin: of `block_causal`; see `vllm_d2f.reference.decode`.
    """
    query, key = batch.position_BT[:, :, None], batch.position_BT[:, None]
    same_BQK = batch.document_BT[:, :, None] == batch.document_BT[:, None]
    if rule == "causal":
        same_BQK = same_BQK & (key <= query)
    elif rule == "block_causal":
        zero = block_origin == "zero"
        origin = torch.zeros_like(query) if zero else batch.prompt_BT[:, :, None]
        prompt_rule = None if zero else prompt_block
        same_BQK = same_BQK & may_attend(query, key, origin, block_size, prompt_rule)
    if batch.window_BT is not None and batch.first_BT is not None:
        window, first = batch.window_BT, batch.first_BT[:, :, None]
        clean_BQK = (window[:, None] == 0) & (key < first)
        same_BQK = same_BQK & ((window[:, :, None] == window[:, None]) | clean_BQK)
    # A row of padding that attends to nothing would be NaN.
    itself_QK = torch.eye(batch.ids_BT.shape[1], dtype=torch.bool, device=same_BQK.device)
    return same_BQK & (batch.document_BT >= 0)[:, None] | itself_QK


def as_argument(allowed_BQK: Tensor, attention: str, dtype: torch.dtype) -> Any:
    """Return the `attention_mask` for a transformers model with this attention implementation."""
    if attention == "sdpa":
        return allowed_BQK[:, None]
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        B, Q, K = allowed_BQK.shape

        def mask_mod(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return allowed_BQK[b, q, k]

        return create_block_mask(mask_mod, B, None, Q, K, device=str(allowed_BQK.device))
    bias_B1QK = torch.zeros(allowed_BQK.shape, dtype=dtype, device=allowed_BQK.device)
    return bias_B1QK.masked_fill(~allowed_BQK, torch.finfo(dtype).min)[:, None]


def chosen_attention(name: str, device: torch.device) -> str:
    """Return the implementation behind `auto`, or `name` after a check that it can train here.

    Raises:
        RuntimeError: saying what is missing.
    """
    if name == "auto":
        # On a CPU, plain matrix products are nearly twice as fast as SDPA with a mask.
        return "sdpa" if device.type == "cuda" else "eager"
    if name in ("flex_attention", "xformers") and device.type != "cuda":
        raise RuntimeError(
            f"model.attention: {name} needs a CUDA device for training; use auto, eager or sdpa"
        )
    if name == "xformers":
        register_xformers()
    return name


def xformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run xformers' memory-efficient attention, as an attention function of transformers.

    Args:
        query, key, value: (B, heads, T, head size); fewer key heads than query heads allowed.
        attention_mask: additive, (B, 1, Q, K).
    """
    from xformers.ops import memory_efficient_attention

    heads, T = query.shape[1], query.shape[2]
    repeat = heads // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    bias = None
    if attention_mask is not None:
        # xformers needs memory with rows whose length is a multiple of 8.
        K = key.shape[2]
        room = torch.zeros(
            (*attention_mask.shape[:3], -(-K // 8) * 8), dtype=query.dtype, device=query.device
        )
        room[..., :K] = attention_mask
        bias = room[..., :K].expand(-1, heads, T, K)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scaling)
    return out, None


def register_xformers() -> None:
    """Make `attn_implementation="xformers"` known to transformers.

    Raises:
        RuntimeError: xformers is not installed.
    """
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "model.attention: xformers is not installed; pip install xformers, or use sdpa"
        ) from error
    from transformers import AttentionInterface

    AttentionInterface.register("xformers", xformers_attention)
