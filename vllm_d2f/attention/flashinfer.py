# SPDX-License-Identifier: Apache-2.0
"""vLLM attention backend for block-causal batches on FlashInfer: the default on CUDA.

A step is one non-causal `BatchPrefillWithPagedKVCacheWrapper` plan over block sequences, made
once and run by every layer. vLLM's own FlashInfer backend runs the same kernel, but sizes its
buffers for `max_num_seqs` sequences; here a request is several.

Queries stay in the model's type with an fp8 cache too; FlashInfer serves that from its FA2 kernels.

Shape suffixes: T tokens, H query heads, K key heads, D head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_flashinfer_layout_string
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_d2f.attention.page_lists import PageLists
from vllm_d2f.attention.selection import HEAD_SIZES
from vllm_d2f.settings import served_settings

CACHE_TYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
OTHER_MODELS = (
    "this backend serves D2F models, whose batches are non-causal sequences; for other models "
    "choose another --attention-backend"
)
GRAPH_KERNELS = "fa2"
"""FlashInfer's kernels that are recorded: their grid does not depend on the lengths of a step."""

PLAN_BYTES = 8 << 20
"""Memory that FlashInfer takes for the plan of a step."""

WORKSPACE_BYTES_PER_CHANNEL = 16
"""Per channel of a query token: FlashInfer splits long sequences and keeps partial results."""


class BlockCausalBackend(AttentionBackend):
    """Block-causal attention as one non-causal FlashInfer sequence per block."""

    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
    ]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        # The member of vLLM's enumeration that it is registered as.
        return "CUSTOM"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)

    @staticmethod
    def get_impl_cls() -> type["BlockCausalImpl"]:
        return BlockCausalImpl

    @staticmethod
    def get_builder_cls() -> type["BlockCausalBuilder"]:
        return BlockCausalBuilder


@dataclass(frozen=True, slots=True)
class BlockCausalMetadata(AttentionMetadata):
    """A planned step.

    Attributes:
        wrapper: FlashInfer's, with its plan made.
        num_tokens: queries in the plan; the rows behind them are padding.
        layout: "NHD" or "HND", how the wrapper reads a page.
        order: the permutation of a layer's cache that gives this layout.
    """

    wrapper: Any
    num_tokens: int
    layout: str
    order: tuple[int, ...]


class BlockCausalBuilder(AttentionMetadataBuilder[BlockCausalMetadata]):
    """Plans a step.

    A plan depends on lengths, so it is made outside of CUDA graphs. With piecewise graphs attention
    runs outside too. A FULL graph has recorded the kernels of a wrapper. There is one such wrapper
    for each number of sequences, and planning a step writes the buffers that its kernels read.

    Attributes:
        replayed: whether the next step is replayed by a FULL graph, or captured for one.
    """

    replayed = False

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        mode = vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.has_full_cudagraphs():
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        kinds = {(layer.num_heads, layer.impl.scale) for layer in layers.values()}
        if len(kinds) != 1:
            raise ValueError(
                f"attention layers differ in (heads, scale): {sorted(kinds)}; choose another "
                "--attention-backend"
            )
        self.num_heads, self.scale = kinds.pop()
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.head_size = kv_cache_spec.head_size
        cache_dtype = vllm_config.cache_config.cache_dtype
        self.query_type: torch.dtype = vllm_config.model_config.dtype  # type: ignore[assignment]
        self.cache_type = CACHE_TYPES.get(cache_dtype, self.query_type)

        scheduler = vllm_config.scheduler_config
        self.max_tokens = scheduler.max_num_batched_tokens
        page_size = kv_cache_spec.block_size
        pages_per_request = -(-vllm_config.model_config.max_model_len // page_size)
        model_config = vllm_config.model_config
        if getattr(model_config.hf_config, "d2f", None) is None:
            raise ValueError(OTHER_MODELS)
        params = served_settings(model_config).params
        # Each block of a query, and a prompt, lists all pages of its request. With asynchronous
        # scheduling a query, at most a canvas, is longer than its window.
        canvas = getattr(model_config.hf_config, "canvas_length", None) or 0
        blocks = max(params.max_blocks, canvas // params.block_size) + 1
        self.pages = PageLists(
            page_size, scheduler.max_num_seqs * blocks * pages_per_request, device
        )
        self._workspace: Tensor | None = None
        self._wrapper: Any = None
        # By number of sequences.
        self._graph_wrappers: dict[int, Any] = {}
        self._graph_plan_memory: Tensor | None = None

    def _get_workspace_buffer(self) -> Tensor:
        # vLLM lets the builders of all groups share one workspace.
        if self._workspace is None:
            channels = self.max_tokens * self.num_heads * self.head_size
            size = max(
                envs.VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE, channels * WORKSPACE_BYTES_PER_CHANNEL
            )
            self._workspace = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return self._workspace

    def set_workspace_buffer(self, workspace_buffer: Tensor) -> None:
        self._workspace = workspace_buffer

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BlockCausalMetadata:
        common = common_attn_metadata
        if common.causal is not False:
            raise ValueError(OTHER_MODELS)
        kv_len = common.seq_lens_cpu_upper_bound
        assert kv_len is not None  # D2FModelState gives the exact lengths
        layout = self.vllm_config.cache_config.get_resolved_kv_cache_layout()
        name = get_flashinfer_layout_string(layout)
        query_start_S1 = common.query_start_loc_cpu.numpy()
        paged = self.pages.build(query_start_S1, kv_len.numpy(), common.block_table_tensor)
        wrapper = self._graph_wrapper(len(kv_len), name) if self.replayed else self._any(name)
        wrapper.plan(
            qo_indptr=paged.query_start_S1,
            paged_kv_indptr=paged.page_start_S1,
            paged_kv_indices=paged.pages_N,
            paged_kv_last_page_len=paged.last_page_len_S,
            num_qo_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim_qk=self.head_size,
            page_size=self.pages.page_size,
            causal=False,
            sm_scale=self.scale,
            q_data_type=self.query_type,
            kv_data_type=self.cache_type,
            seq_lens=paged.kv_len_S,
            # Otherwise FlashInfer searches for the largest in Python, sequence by sequence.
            max_token_per_sequence=common.max_query_len,
        )
        return BlockCausalMetadata(
            wrapper, int(query_start_S1[-1]), name, tuple(layout.layer_view_order)
        )

    def _any(self, layout: str) -> Any:
        """Return the wrapper for steps of any form."""
        if self._wrapper is None:
            self._wrapper = self._new_wrapper(layout, backend="auto")
        return self._wrapper

    def _new_wrapper(self, layout: str, **options: Any) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        return BatchPrefillWithPagedKVCacheWrapper(self._get_workspace_buffer(), layout, **options)

    def _graph_wrapper(self, num_sequences: int, layout: str) -> Any:
        """Return the wrapper whose kernels the graphs of `num_sequences` sequences have recorded.

        All wrappers share the page list, the workspace and the memory for plans: graphs run one
        after another, and a step writes its plan before it replays its graph.
        """
        if num_sequences not in self._graph_wrappers:

            def buffer(size: int) -> Tensor:
                return torch.zeros(size, dtype=torch.int32, device=self.device)

            wrapper = self._new_wrapper(
                layout,
                use_cuda_graph=True,
                qo_indptr_buf=buffer(num_sequences + 1),
                paged_kv_indptr_buf=buffer(num_sequences + 1),
                paged_kv_indices_buf=self.pages.buffer_N,
                paged_kv_last_page_len_buf=buffer(num_sequences),
                backend=GRAPH_KERNELS,
            )
            if self._graph_plan_memory is None:
                self._graph_plan_memory = torch.empty(
                    PLAN_BYTES, dtype=torch.uint8, device=self.device
                )
            wrapper.reset_workspace_buffer(self._get_workspace_buffer(), self._graph_plan_memory)
            self._graph_wrappers[num_sequences] = wrapper
        return self._graph_wrappers[num_sequences]


class BlockCausalImpl(AttentionImpl[BlockCausalMetadata]):
    """One layer's attention: run the step's plan."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        refused = {
            "alibi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "a logits soft cap": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "a shared cache": kv_sharing_target_layer_name is not None,
        }
        if names := [name for name, hit in refused.items() if hit]:
            raise NotImplementedError(
                f"block-causal FlashInfer attention has no {', '.join(names)}; choose another "
                "--attention-backend"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: BlockCausalMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention of the step's queries over the cache, which has their keys already.

        Args:
            query: [T, H, D], rows from `num_tokens` on are padding.
            kv_cache: [pages, K, page size, 2 D], keys before values.
            output: [T, H, D], written.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("quantised attention output is not supported")
        if attn_metadata is None:
            return output.zero_()  # vLLM profiles its memory
        if kv_cache.dtype == torch.uint8:
            kv_cache = kv_cache.view(CACHE_TYPES[self.kv_cache_dtype])
        # PyTorch ignores the strides of a single key head, but the kernel reads them.
        kv_cache = canonicalize_singleton_dim_strides(kv_cache.permute(*attn_metadata.order))
        pages = kv_cache.split(self.head_size, dim=-1)
        num_tokens = attn_metadata.num_tokens
        attn_metadata.wrapper.run(
            query[:num_tokens],
            pages,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            out=output[:num_tokens],
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the step's keys and values to their pages, in the cache's type."""
        key_pages, value_pages = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        torch.ops._C_cache_ops.reshape_and_cache_flash(
            key,
            value,
            key_pages,
            value_pages,
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )
