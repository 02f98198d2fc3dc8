# SPDX-License-Identifier: Apache-2.0
"""What a D2F model keeps per request in the worker, and how a batch becomes virtual sequences.

A slot is the runner's row number of a request. A request that is preempted loses its slot and its
pages, but not its window: `remove_request` puts the window aside and `add_request` takes it up
again, so the answer does not depend on preemptions.

Shape suffixes: S slots or virtual sequences, R requests of the batch, W window positions, H hidden.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_d2f.attention.cuda_graphs import fill_up, whole_blocks
from vllm_d2f.blocks import NO_PROMPT_END, block_sequences
from vllm_d2f.d2f import Window, add
from vllm_d2f.patches import p04_forget_finished, p12_full_graphs, p13_warm_up
from vllm_d2f.sampling.request_sampler import Proposer, make_proposer
from vllm_d2f.sampling.sample import Sampling
from vllm_d2f.settings import (
    MAX_END_TOKENS,
    end_tokens,
    request_params,
    served_settings,
    wants_trace,
)
from vllm_d2f.worker.grammar import Grammars
from vllm_d2f.worker.kv_zeroing import StalePages
from vllm_d2f.worker.sampler import D2FSampler

if TYPE_CHECKING:
    from vllm_d2f.attention.flashinfer import BlockCausalBuilder


class D2FModelState(ModelState):
    """vLLM's per-model seam of the V2 runner, filled for D2F."""

    # A step commits window tokens and nothing beside them.
    num_new_sampled_tokens_per_step = 0

    def __init__(
        self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: Any
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        p04_forget_finished.install()
        p13_warm_up.install()
        mode = vllm_config.compilation_config.cudagraph_mode
        self.full_graphs = mode is not None and mode.has_full_cudagraphs()
        if self.full_graphs:
            p12_full_graphs.install()
        d2f_model = cast(Any, model)  # worker.model.D2FModel, which imports this file
        self.project = d2f_model.project
        # With tensor parallelism a row's token and confidence are reduced over the ranks' shards of
        # the vocabulary; only what needs the whole row gathers it.
        self.sharded = vllm_config.parallel_config.tensor_parallel_size > 1
        if self.sharded:
            self.project_shard = d2f_model.project_shard
            self.first_token = d2f_model.first_token
        self.settings = served_settings(self.model_config)
        config = self.model_config.hf_config
        self.mask_id: int = config.mask_token_id
        self.shift: bool = config.logits_shift
        self.window = Window.empty(
            self.max_num_reqs, self.settings.window, MAX_END_TOKENS, self.mask_id, device
        )
        # The output at the last committed position predicts the first one of the window.
        self.last_hidden_SH = torch.zeros(
            self.max_num_reqs,
            self.model_config.get_hidden_size(),
            dtype=cast(torch.dtype, self.dtype),
            device=device,
        )
        self.sampling = Sampling.greedy(self.max_num_reqs, device)
        # Slots with a temperature, on the host: greedy decoding runs no sampling code.
        self.drawing: set[int] = set()
        # Those of them that have top_k or top_p.
        self.cutting: set[int] = set()
        # Requests that ask for more (penalties, log-probabilities, a grammar ...), by slot, and
        # those of them that were preempted, by id.
        self.proposers: dict[int, Proposer] = {}
        self.grammars = Grammars(vllm_config, self.mask_id)
        self._proposers_aside: dict[str, Proposer] = {}
        # Slots of requests that have come back from a preemption.
        self.resumed: set[int] = set()
        # Requests that ask for a trace, by slot.
        self.traced: set[int] = set()
        # See `sampler`.
        self.lagging = bool(vllm_config.scheduler_config.async_scheduling)
        self.prompt_len_S = np.full(self.max_num_reqs, NO_PROMPT_END)
        self.block_size_S = np.ones(self.max_num_reqs, dtype=np.int64)
        self.stale_pages = (
            StalePages(vllm_config, self.max_num_reqs) if self.device.type == "cpu" else None
        )
        self._slots: dict[str, int] = {}
        self._aside: dict[str, Window] = {}

    # Requests

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        sampling = new_req_data.sampling_params
        assert sampling is not None and sampling.max_tokens is not None
        req_id, prompt_len = new_req_data.req_id, new_req_data.prompt_len
        params = request_params(self.settings, sampling.extra_args)
        self._slots[req_id] = req_index
        if self.stale_pages is not None:
            self.stale_pages.start(req_index)
        self.prompt_len_S[req_index] = prompt_len
        self.block_size_S[req_index] = params.block_size
        self._set_sampling(req_index, sampling)
        if wants_trace(sampling.extra_args):
            self.traced.add(req_index)
        self.window.start(
            req_index,
            params,
            max_tokens=sampling.max_tokens,
            limit=self.max_model_len - prompt_len,
            ends=end_tokens(sampling),
            mask_id=self.mask_id,
        )
        self._set_proposer(req_index, new_req_data, params.tau_conf)
        row = self._row(req_index)
        rows = self._aside.pop(req_id, None)
        if rows is None:
            rows = self.window.rows(row)
            add(rows)
        else:
            self.resumed.add(req_index)
        self.window.put(row, rows)

    def _set_sampling(self, slot: int, params: SamplingParams) -> None:
        if params.temperature > 0:
            self.drawing.add(slot)
            if params.top_k > 0 or params.top_p < 1:
                self.cutting.add(slot)
        self.sampling.temperature_R[slot] = params.temperature
        self.sampling.top_k_R[slot] = max(params.top_k, 0)
        self.sampling.top_p_R[slot] = params.top_p
        self.sampling.min_p_R[slot] = params.min_p
        # Without a seed of its own a request takes the next of the engine's (same on every rank).
        seed = int(torch.randint(1 << 62, ())) if params.seed is None else params.seed
        self.sampling.seed_R[slot] = seed

    def _row(self, slot: int) -> torch.Tensor:
        """A slot as an index tensor; filled on the device, where a copy would wait for it."""
        return torch.full((1,), slot, dtype=torch.int64, device=self.device)

    def _set_proposer(self, slot: int, data: NewRequestData, tau_conf: float) -> None:
        params = data.sampling_params
        assert params is not None
        proposer = self._proposers_aside.pop(data.req_id, None)
        if proposer is None:
            structured = params.structured_outputs is not None
            proposer = make_proposer(
                params,
                prompt=data.prompt_token_ids or (),
                sampling=self.sampling.rows(self._row(slot)),
                ends=end_tokens(params),
                tau_conf=tau_conf,
                mask_id=self.mask_id,
                vocab_size=self.model_config.get_vocab_size(),
                window=self.settings.window,
                grammar=self.grammars.constraint(params) if structured else None,
                logprobs_mode=self.model_config.logprobs_mode,
                device=self.device,
            )
        if proposer is not None:
            self.proposers[slot] = proposer
            self.drawing.discard(slot)  # it draws by itself
            self.cutting.discard(slot)

    def remove_request(self, req_id: str) -> None:
        slot = self._slots.pop(req_id, None)
        if slot is None:
            return
        if slot in self.proposers:
            self._proposers_aside[req_id] = self.proposers[slot]
        self._aside[req_id] = self.window.rows(self._row(slot))
        self._free(slot)

    def forget_requests(self, req_ids: set[str]) -> None:
        """Finished requests do not come back (called by the patch of the runner's clean-up)."""
        for req_id in req_ids:
            slot = self._slots.pop(req_id, None)
            self._aside.pop(req_id, None)
            self._proposers_aside.pop(req_id, None)
            if slot is not None:
                self._free(slot)

    def _free(self, slot: int) -> None:
        self.prompt_len_S[slot] = NO_PROMPT_END
        self.drawing.discard(slot)
        self.cutting.discard(slot)
        self.traced.discard(slot)
        self.resumed.discard(slot)
        self.proposers.pop(slot, None)

    # Inputs

    def prepare_inputs_embeds(self, *args: Any) -> None:
        return None

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        # The sampler picks its rows from all of them, see D2FModel.compute_logits.
        input_batch.logits_indices = slice(0, input_batch.num_tokens)  # type: ignore[assignment]
        # Bring the new windows back to the scheduler as they are, for their widths. One that
        # schedules ahead does not wait for them.
        input_batch.has_structured_output_reqs = not self.lagging
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
        prompt_len_R, block_size_R = self.prompt_len_S[slot_R], self.block_size_S[slot_R]
        if for_capture:  # of a FULL graph: made-up requests, windows from position 0 on
            prompt_len_R = np.zeros_like(prompt_len_R)
            block_size_R = np.full_like(block_size_R, self.settings.params.block_size)
        if self.stale_pages is not None and not for_capture:
            self.stale_pages.clear(slot_R, start_R + length_R, block_tables, kv_cache_config)
        sequences = block_sequences(
            start_R,
            start_R + length_R,
            prompt_len_R,
            block_size_R,
            np.full_like(block_size_R, self.settings.params.block_size)
            if self.settings.prompt_attention == "block_causal"
            else None,
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
        """Whether a step has the form of a captured graph (asked by p12, before its inputs)."""
        return whole_blocks(
            start_R,
            length_R,
            self.prompt_len_S[slot_R],
            self.block_size_S[slot_R],
            self.settings.params.block_size,
        )

    # Outputs

    def custom_sampler(self, sampler: Any) -> tuple[D2FSampler, None]:
        if self.device.type == "cuda":
            from vllm_d2f.worker.cuda_sampler import CudaSampler

            return CudaSampler(self, sampler), None
        return D2FSampler(self, sampler), None
