# SPDX-License-Identifier: Apache-2.0
"""vLLM's ModelState for D2F: takes requests in, and turns a batch into block sequences.

Shape suffixes: R requests of the batch, S block sequences.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_d2f.attention.cuda_graphs import fill_up, whole_blocks
from vllm_d2f.blocks import block_sequences
from vllm_d2f.patches import apply
from vllm_d2f.worker.kv_zeroing import KVZeroing
from vllm_d2f.worker.proposals import Head
from vllm_d2f.worker.request_states import RequestStates
from vllm_d2f.worker.sampler import D2FSampler

if TYPE_CHECKING:
    from vllm_d2f.attention.flashinfer import BlockCausalBuilder


class D2FModelState(ModelState):
    """The interface of vLLM's V2 runner to what differs between models."""

    # A step commits window tokens and nothing beside them.
    num_new_sampled_tokens_per_step = 0

    def __init__(
        self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: Any
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        apply("worker", vllm_config)
        mode = vllm_config.compilation_config.cudagraph_mode
        self.full_graphs = mode is not None and mode.has_full_cudagraphs()
        self.states = RequestStates(vllm_config, self.device)
        self.settings = self.states.settings
        self.kv_zeroing = (
            KVZeroing(vllm_config, self.max_num_reqs) if self.device.type == "cpu" else None
        )

    # Requests

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        if self.kv_zeroing is not None:
            self.kv_zeroing.start(req_index)
        self.states.add(req_index, new_req_data)

    def apply_staged_writes(self) -> None:
        self.states.apply_staged_writes()

    def remove_request(self, req_id: str) -> None:
        """Put a preempted request aside; `forget_requests` has forgotten finished ones before."""
        self.states.preempt(req_id)

    def forget_requests(self, req_ids: set[str]) -> None:
        """Forget finished requests, which do not come back (called by p04)."""
        for req_id in req_ids:
            self.states.finish(req_id)

    # Inputs

    def prepare_inputs_embeds(self, *args: Any) -> None:
        return None

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        # The sampler picks its rows from all of them, see D2FModel.compute_logits.
        input_batch.logits_indices = slice(0, input_batch.num_tokens)  # type: ignore[assignment]
        # Bring the new windows back to the scheduler as they are, for their widths. With
        # asynchronous scheduling it does not wait for them.
        input_batch.has_structured_output_reqs = not self.states.async_scheduling
        return {}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        slot_R = input_batch.idx_mapping_np
        start_R = input_batch.num_computed_tokens_np
        query_start_R1 = input_batch.query_start_loc_np[: input_batch.num_reqs + 1]
        length_R = query_start_R1[1:] - query_start_R1[:-1]
        origin_R, block_size_R = self.states.origin_S[slot_R], self.states.block_size_S[slot_R]
        served_R = np.full_like(block_size_R, self.settings.params.block_size)
        if for_capture:  # a FULL graph is captured from dummy windows at position 0
            origin_R, block_size_R = np.zeros_like(origin_R), served_R
        if self.kv_zeroing is not None and not for_capture:
            self.kv_zeroing.zero(slot_R, start_R + length_R, block_tables, kv_cache_config)
        # A block-causal prompt whose blocks are counted from position 0 needs no rule of its own.
        block_causal = self.settings.prompt_attention == "block_causal"
        prompt_block_R = served_R if block_causal and not self.states.origin_zero else None
        sequences = block_sequences(
            start_R, start_R + length_R, origin_R, block_size_R, prompt_block_R
        )
        # vLLM's runs without requests may be longer than a request can be (autotuning with one slot
        # and a budget beyond the model's length); page tables end there.
        np.minimum(sequences.kv_len_S, self.max_model_len, out=sequences.kv_len_S)
        if self.full_graphs:
            replayed = for_capture or cudagraph_mode == CUDAGraphMode.FULL
            for attn_group in (one for several in attn_groups for one in several):
                builder = attn_group.get_metadata_builder(ubatch_idx)
                cast("BlockCausalBuilder", builder).replayed = replayed
            if replayed:
                width = input_batch.num_tokens_after_padding
                sequences = fill_up(sequences, width // self.settings.params.block_size)
        query_start = torch.from_numpy(sequences.query_start_S1)
        kv_len = torch.from_numpy(sequences.kv_len_S)
        request_S = async_tensor_h2d(sequences.request_S, device=self.device)
        max_kv_len = int(sequences.kv_len_S.max())
        tables = []
        for table, group in zip(block_tables, kv_cache_config.kv_cache_groups, strict=True):
            pages = -(-max_kv_len // group.kv_cache_spec.block_size)
            tables.append(table[:, :pages].index_select(0, request_S))
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=len(sequences.request_S),
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=async_tensor_h2d(query_start, device=self.device),
            query_start_loc_cpu=query_start,
            max_query_len=int((sequences.query_start_S1[1:] - sequences.query_start_S1[:-1]).max()),
            seq_lens=async_tensor_h2d(kv_len, device=self.device),
            max_seq_len=max_kv_len,
            block_tables=tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=kv_len,
            for_cudagraph_capture=for_capture,
            causal=False,
            ubatch_idx=ubatch_idx,
        )

    def fits_full_graph(
        self,
        slot_R: NDArray[np.integer],
        start_R: NDArray[np.integer],
        length_R: NDArray[np.integer],
    ) -> bool:
        """Return whether a captured graph can replay a step (p12 calls it before the inputs)."""
        return whole_blocks(
            start_R,
            length_R,
            self.states.origin_S[slot_R],
            self.states.block_size_S[slot_R],
            self.settings.params.block_size,
        )

    def warm_up(self, *args: Any) -> None:
        """Run D2F's steps before the first request instead of vLLM's (called by p13)."""
        from vllm_d2f.worker.warmup import warm_up

        warm_up(*args)

    def step_seconds(self, *args: Any) -> dict[int, float]:
        """Measure what a step costs by its positions (called by p15)."""
        from vllm_d2f.worker.step_cost import measured

        return measured(self.vllm_config, *args)

    # Outputs

    def custom_sampler(self, sampler: Any) -> tuple[D2FSampler, None]:
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        model = cast(Head, self.model)
        return D2FSampler(self.states, model, sampler, tensor_parallel_size=ranks), None
