# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's paged attention in float64, and a builder that plans with it, without a GPU."""

import sys
from types import ModuleType, SimpleNamespace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_d2f.attention import flashinfer
from vllm_d2f.d2f import may_attend

HEAD = 128


class Emulated:
    """`flashinfer.BatchPrefillWithPagedKVCacheWrapper` in float64.

    In CUDA graph mode `run` stands for a replay: it reads the buffers that were given at the
    start, and nothing of the last `plan` but what it wrote there.
    """

    made = 0

    def __init__(
        self,
        workspace,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        backend="auto",
    ):
        assert workspace.dtype == torch.uint8 and workspace.data_ptr() % 16 == 0
        assert kv_layout in ("NHD", "HND")
        type(self).made += 1
        self.kv_layout, self.plans = kv_layout, 0
        self.buffers = None
        if use_cuda_graph:
            self.buffers = (
                qo_indptr_buf,
                paged_kv_indptr_buf,
                paged_kv_indices_buf,
                paged_kv_last_page_len_buf,
            )
            self.size, self.rows, self.plan_memory = len(qo_indptr_buf) - 1, None, None
            assert len(paged_kv_indptr_buf) == self.size + 1
            assert len(paged_kv_last_page_len_buf) == self.size

    def reset_workspace_buffer(self, workspace, plan_memory):
        assert workspace.data_ptr() % 16 == 0 and plan_memory.data_ptr() % 16 == 0
        self.plan_memory = plan_memory

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        causal=False,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
        seq_lens=None,
        max_token_per_sequence=None,
    ):
        for x in (
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            seq_lens,
        ):
            assert x.dtype == torch.int32 and x.is_contiguous() and x.dim() == 1
        size = len(qo_indptr) - 1
        assert len(paged_kv_indptr) == size + 1 and len(paged_kv_last_page_len) == size
        assert max_token_per_sequence == qo_indptr.diff().max()
        assert qo_indptr[0] == 0 and paged_kv_indptr[0] == 0
        count = paged_kv_indptr.diff()
        if self.buffers is None:
            assert (qo_indptr.diff() > 0).all() and (count > 0).all()
        else:  # a sequence that fills up a graph has nothing at all
            assert ((qo_indptr.diff() > 0) == (count > 0)).all() and (count >= 0).all()
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert (
            (paged_kv_last_page_len >= (count > 0)) & (paged_kv_last_page_len <= page_size)
        ).all()
        # flashinfer.get_seq_lens
        length = (count - 1).clamp(min=0) * page_size + paged_kv_last_page_len
        assert torch.equal(length, seq_lens)
        assert not causal and num_qo_heads % num_kv_heads == 0
        self.group = num_qo_heads // num_kv_heads
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.call = (qo_indptr, paged_kv_indptr, paged_kv_indices, length)
        self.scale, self.page_size, self.types = sm_scale, page_size, (q_data_type, kv_data_type)
        self.plans += 1
        if self.buffers is not None:
            # FlashInfer refuses these.
            assert size == self.size and len(paged_kv_indices) <= len(self.buffers[2])
            self.rows = self.rows or int(qo_indptr[-1])
            assert qo_indptr[-1] <= self.rows
            given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            for buffer, values in zip(self.buffers, given, strict=True):
                buffer[: len(values)].copy_(values)

    def run(self, q, paged_kv_cache, k_scale=1.0, v_scale=1.0, out=None):
        if self.buffers is None:
            start, page_start, pages, length = self.call
            rows = start[-1]
        else:
            start, page_start, pages, last = self.buffers
            length = (page_start.diff() - 1).clamp(min=0) * self.page_size + last
            rows = self.rows
        assert q.shape == out.shape == (rows, self.heads[0], self.heads[2])
        for s in range(len(length)):
            if not length[s]:
                continue
            listed = pages[page_start[s] : page_start[s + 1]].long()
            key, value = (self.read(cache[listed])[: length[s]] for cache in paged_kv_cache)
            rows = slice(start[s], start[s + 1])
            scores = torch.einsum("qhd,khd->hqk", q[rows], key) * self.scale * k_scale
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value) * v_scale
        return out

    def read(self, pages):
        if self.kv_layout == "HND":
            pages = pages.transpose(1, 2)
        assert pages.shape[1:] == (self.page_size, self.heads[1], self.heads[2])
        return pages.flatten(0, 1).double().repeat_interleave(self.group, 1)


def put_in_place(monkeypatch):
    """Let `import flashinfer` give the emulation."""
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Emulated
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "1024")
    monkeypatch.setattr(Emulated, "made", 0)


def make_builder(
    monkeypatch,
    heads,
    page_size,
    layout,
    *,
    cache_dtype="auto",
    seqs=8,
    length=256,
    blocks=4,
    block_size=8,
    canvas=32,
):
    """Return a real builder of a made-up configuration."""
    layer = SimpleNamespace(num_heads=heads[0], impl=SimpleNamespace(scale=HEAD**-0.5))
    monkeypatch.setattr(
        flashinfer, "get_layers_from_vllm_config", lambda *_: {"a": layer, "b": layer}
    )
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype, get_resolved_kv_cache_layout=lambda: layout
        ),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            max_model_len=length,
            hf_config=SimpleNamespace(
                d2f={"max_blocks": blocks, "block_size": block_size},
                family=None,
                canvas_length=canvas,
            ),
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=seqs),
    )
    spec = SimpleNamespace(num_kv_heads=heads[1], head_size=HEAD, block_size=page_size)
    return flashinfer.BlockCausalBuilder(spec, ["a", "b"], config, torch.device("cpu"))


def common_metadata(sequences, table_RP, page_size, padded=0):
    """Return the metadata that `D2FModelState.prepare_attn` passes on."""
    query_start = torch.from_numpy(sequences.query_start_S1)
    kv_len = torch.from_numpy(sequences.kv_len_S)
    pages = -(-int(kv_len.max()) // page_size)
    return CommonAttentionMetadata(
        query_start_loc=query_start,
        query_start_loc_cpu=query_start,
        seq_lens=kv_len,
        seq_lens_cpu_upper_bound=kv_len,
        num_reqs=len(kv_len),
        num_actual_tokens=int(query_start[-1]) + padded,
        max_query_len=int(query_start.diff().max()),
        max_seq_len=int(kv_len.max()),
        block_table_tensor=table_RP[:, :pages][torch.from_numpy(sequences.request_S)],
        slot_mapping=torch.zeros(0),
        causal=False,
    )


def dense(query, key, value, start, stop, prompt, block):
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / HEAD**0.5
    position = torch.arange(stop)
    mask = may_attend(position[start:, None], position[None], int(prompt), int(block))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)
