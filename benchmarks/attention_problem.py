# SPDX-License-Identifier: Apache-2.0
"""The attention of one layer in a D2F step: its tensors, ways to compute it, the float64 result.

A variant is set up once per step (index arithmetic, masks, plans) and returns what one layer runs.

Shape suffixes: R requests, T = R * W query tokens, W window positions, L context + window, H query
heads, K key heads, D head size, S block sequences, P pages of B positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_d2f.blocks import BlockSequences, block_sequences, may_attend

PAGE = 32


class Unavailable(Exception):
    """This machine cannot run the variant, and why."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Case:
    """`requests` of the same shape: a prompt of `context` positions, then open blocks."""

    context: int
    requests: int
    blocks: int
    block_size: int

    @property
    def window(self) -> int:
        return self.blocks * self.block_size


@dataclass(frozen=True)
class Problem:
    """A case with its tensors. Pages of the cache lie in random order, as in a server."""

    case: Case
    layer: Layer
    query_THD: Tensor
    key_RLKD: Tensor
    value_RLKD: Tensor
    pages_RP: Tensor

    @classmethod
    def make(
        cls, case: Case, layer: Layer, device: torch.device, dtype: torch.dtype, seed: int
    ) -> "Problem":
        # Drawn on the device: a large cache would take longer to copy than to measure.
        generator = torch.Generator(device).manual_seed(seed)
        length = case.context + case.window
        pages = -(-length // PAGE)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        order = torch.randperm(case.requests * pages, generator=generator, device=device)
        query = random(case.requests * case.window, layer.heads, layer.head_dim)
        key, value = (
            random(case.requests, length, layer.kv_heads, layer.head_dim) for _ in range(2)
        )
        return cls(case, layer, query, key, value, order.view(case.requests, pages).int())

    @property
    def length(self) -> int:
        return self.case.context + self.case.window

    def mask_WL(self) -> Tensor:
        """The attention rule for one request's window."""
        position_L = torch.arange(self.length, device=self.query_THD.device)
        context = self.case.context
        query_W1, key_1L = position_L[context:, None], position_L[None]
        return may_attend(query_W1, key_1L, context, self.case.block_size)

    def sequences(self) -> tuple[BlockSequences, Tensor]:
        """The window's blocks as sequences, and the page table of each."""
        start_R = np.full(self.case.requests, self.case.context)
        size_R = np.full(self.case.requests, self.case.block_size)
        found = block_sequences(start_R, start_R + self.case.window, start_R, size_R)
        request_S = torch.from_numpy(found.request_S).to(self.pages_RP.device)
        return found, self.pages_RP[request_S]

    # A server's cache is there before the step: made once, not part of a variant's set-up.

    @cached_property
    def paged(self) -> tuple[Tensor, Tensor]:
        """Keys and values on their pages: [pages, B, K, D]."""
        return self._paged(self.key_RLKD), self._paged(self.value_RLKD)

    def _paged(self, source_RLKD: Tensor) -> Tensor:
        requests, pages = self.pages_RP.shape
        padded = source_RLKD.new_zeros(requests, pages * PAGE, *source_RLKD.shape[2:])
        padded[:, : self.length] = source_RLKD
        out = torch.empty_like(padded).view(requests * pages, PAGE, *source_RLKD.shape[2:])
        out[self.pages_RP.flatten().long()] = padded.view_as(out)
        return out

    @cached_property
    def cpu_paged(self) -> tuple[Tensor, Tensor]:
        """The same in the layout of vLLM's CPU kernel, written by its own operation."""
        from vllm import _custom_ops as ops

        layer, dtype = self.layer, self.query_THD.dtype
        shape = (self.pages_RP.numel(), layer.kv_heads, 2 * PAGE, layer.head_dim)
        key_cache, value_cache = torch.zeros(shape, dtype=dtype).chunk(2, dim=2)
        position_L = torch.arange(self.length)
        slot_RL = self.pages_RP[:, position_L // PAGE].long() * PAGE + position_L % PAGE
        key, value = self.key_RLKD.flatten(0, 1), self.value_RLKD.flatten(0, 1)
        slots, isa = slot_RL.flatten(), cpu_isa(layer, dtype)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
        return key_cache, value_cache

    def error(self, out_THD: Tensor, most: int = 2) -> float:
        """Largest difference from a dense float64 computation, over the first requests."""
        group, worst = self.layer.heads // self.layer.kv_heads, 0.0
        W, mask_WL = self.case.window, self.mask_WL()
        for row in range(min(most, self.case.requests)):
            query = self.query_THD[row * W : (row + 1) * W].double().transpose(0, 1)
            key, value = (
                x[row].double().transpose(0, 1).repeat_interleave(group, 0)
                for x in (self.key_RLKD, self.value_RLKD)
            )
            scores = query @ key.transpose(1, 2) / self.layer.head_dim**0.5
            want = scores.masked_fill(~mask_WL, float("-inf")).softmax(-1) @ value
            got = out_THD[row * W : (row + 1) * W].reshape(W, self.layer.heads, -1)
            off = float((got.double().transpose(0, 1) - want).abs().max())
            worst = off if not off <= worst else worst  # a NaN is the worst
        return worst


def cpu_isa(layer: Layer, dtype: torch.dtype) -> str:
    """The instruction set vLLM picks for its CPU kernel."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, PAGE, layer.head_dim)


Run = Callable[[], Tensor]
"""What one layer runs."""


def virtual(problem: Problem) -> Run:
    """What the engine runs: one non-causal sequence per block on a paged kernel."""
    on_cpu = problem.query_THD.device.type == "cpu"
    return _block_sequences_cpu(problem) if on_cpu else _block_sequences_cuda(problem)


def _block_sequences_cpu(problem: Problem) -> Run:
    from vllm import _custom_ops as ops

    layer, query = problem.layer, problem.query_THD
    sequences, table_SP = problem.sequences()
    kv_len_S = torch.from_numpy(sequences.kv_len_S)
    batch: dict[str, Any] = dict(
        seq_lens=kv_len_S, query_start_loc=torch.from_numpy(sequences.query_start_S1), causal=False
    )
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(kv_len_S), num_heads=layer.heads, num_kv_heads=layer.kv_heads,
        head_dim=layer.head_dim, dtype=query.dtype, sliding_window_size=-1,
        isa=cpu_isa(layer, query.dtype), enable_kv_split=True, **batch,
    )  # fmt: skip
    (key_cache, value_cache), out = problem.cpu_paged, torch.empty_like(query)

    def run() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=out,
            scale=layer.head_dim**-0.5, alibi_slopes=None, sliding_window=-1, softcap=0.0,
            block_table=table_SP, scheduler_metadata=metadata, s_aux=None, **batch,
        )  # fmt: skip
        return out

    return run


def _block_sequences_cuda(problem: Problem) -> Run:
    try:
        import flashinfer
    except ImportError:
        raise Unavailable("flashinfer is not installed: pip install flashinfer-python") from None
    from vllm_d2f.attention.page_lists import PageLists

    layer, device = problem.layer, problem.query_THD.device
    sequences, table_SP = problem.sequences()
    pages = PageLists(PAGE, table_SP.numel(), device)
    lists = pages.build(sequences.query_start_S1, sequences.kv_len_S, table_SP)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD")
    wrapper.plan(
        qo_indptr=lists.query_start_S1, paged_kv_indptr=lists.page_start_S1,
        paged_kv_indices=lists.pages_N, paged_kv_last_page_len=lists.last_page_len_S,
        num_qo_heads=layer.heads, num_kv_heads=layer.kv_heads, head_dim_qk=layer.head_dim,
        page_size=PAGE, causal=False, q_data_type=problem.query_THD.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(problem.query_THD, problem.paged)


@cache
def _workspace(device: torch.device) -> Tensor:
    """One for all wrappers: they run one after another."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def sdpa(problem: Problem, paged: bool = False) -> Run:
    """PyTorch's fused attention with a dense mask.

    Args:
        paged: keys are gathered from a paged cache first, in every layer; else they lie together.
    """
    mask_WL = problem.mask_WL()
    query_RWHD = problem.query_THD.unflatten(0, (problem.case.requests, problem.case.window))
    query_RHWD = query_RWHD.transpose(1, 2)
    together = [x.transpose(1, 2) for x in (problem.key_RLKD, problem.value_RLKD)]
    page = problem.pages_RP.flatten().long()

    def gather(pages: Tensor) -> Tensor:
        found = pages[page].view(len(problem.pages_RP), -1, *pages.shape[2:])
        return found[:, : problem.length].transpose(1, 2)

    def run() -> Tensor:
        key, value = map(gather, problem.paged) if paged else together
        out = scaled_dot_product_attention(
            query_RHWD, key, value, attn_mask=mask_WL, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    return run


VARIANTS: dict[str, Callable[[Problem], Run]] = {
    "virtual": virtual,
    "sdpa": sdpa,
    "sdpa_paged": partial(sdpa, paged=True),
}
"""The one interface of all variants: set up for a problem, get what a layer runs."""
