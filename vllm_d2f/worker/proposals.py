# SPDX-License-Identifier: Apache-2.0
"""A token and its confidence at every masked position of a step.

    masked positions -> rows -> hidden states -> logits -> token and confidence

Two choices are made once, when the engine starts. The list of rows is exact on a CPU; on CUDA it is
padded to a bound that the host knows, so that nothing waits for the device. A row is reduced to a
token by PyTorch on a CPU and by a Triton kernel on CUDA. With tensor parallelism either of them
reduces this rank's shard of the vocabulary, and the ranks merge the results. Rows that need the
whole vocabulary (top_k, top_p, a request sampler) gather their logits.

A request whose tokens are decoded in the order of the text (a grammar, a bad word of several
tokens) makes the host wait on CUDA too: the host computes which tokens may come next.

Shape suffixes as in `sampler`.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_d2f.d2f import Window
from vllm_d2f.sampling import missing, tensor_parallel
from vllm_d2f.sampling import sample as torch_sampling
from vllm_d2f.sampling.request_sampler import RequestSampler
from vllm_d2f.sampling.sample import Sampling, simulated_confidence
from vllm_d2f.strategies import NUMBER
from vllm_d2f.worker.masked_bounds import MaskedBounds
from vllm_d2f.worker.masked_rows import MaskedRows, bounded_rows, exact_rows, scatter
from vllm_d2f.worker.request_states import RequestStates

CPU_LOGIT_BYTES, CUDA_LOGIT_BYTES = 32 << 20, 512 << 20
"""Rows go through the language-model head in chunks whose float32 logits stay below this. Each
chunk reads the weights of the head again."""

NOISE_FACTOR = 8
"""Drawing in PyTorch from a shard takes several times the memory of its logits."""

ROWS = 16
"""A padded list of rows is filled up to a multiple of this."""


class Head(Protocol):
    """What `Proposals` needs of the model; see `D2FModel`."""

    def project(self, hidden_NH: Tensor) -> Tensor: ...

    def project_shard(self, hidden_NH: Tensor) -> Tensor: ...

    @property
    def first_token(self) -> int: ...


class Queries(NamedTuple):
    """The requests that denoise in a step.

    Attributes:
        hidden_TH: the model's output.
        slots: slots of the requests, on the host.
        width_D: positions of the window that the query has, on the host.
        slot_D: the slots.
        begin_D, first_D: rows of `hidden_TH` at which the query and its window begin.
        samplers: the requests with a sampler of their own, by their place in the batch.
    """

    hidden_TH: Tensor
    slots: list[int]
    width_D: NDArray[np.integer]
    slot_D: Tensor
    begin_D: Tensor
    first_D: Tensor
    samplers: dict[int, RequestSampler]


class Span(NamedTuple):
    """The rows [begin, end) of one request, known on the host."""

    slot: int
    sampler: RequestSampler | None
    begin: int
    end: int


class Proposals:
    """Samples at the masked positions of a batch of windows."""

    def __init__(
        self,
        states: RequestStates,
        model: Head,
        token_ids_SL: Any,
        *,
        tensor_parallel_size: int = 1,
        cuda: bool | None = None,
    ) -> None:
        """
        Args:
            token_ids_SL: vLLM's tensor of all token ids by slot; penalties read it.
            cuda: use the kernel and padded rows. None: on a CUDA device.

        Raises:
            RuntimeError: the kernel cannot run.
        """
        self.states, self.token_ids_SL = states, token_ids_SL
        self.project, self.project_shard = model.project, model.project_shard
        self.sharded = tensor_parallel_size > 1
        self.first_token = model.first_token if self.sharded else 0
        self.simulate = states.settings.simulate_tokens_per_forward
        self.bounds: MaskedBounds | None = None
        if states.device.type == "cuda" if cuda is None else cuda:
            if reason := missing(states.device):
                raise RuntimeError(reason)
            from vllm_d2f.sampling import confidence_kernel

            self.sample, self.shard = confidence_kernel.sample, confidence_kernel.shard
            logit_bytes, self.noise_factor = CUDA_LOGIT_BYTES, 1
            in_flight = int(states.async_scheduling)
            self.bounds = MaskedBounds(states.max_num_reqs, in_flight, torch.cuda.Event)
            positions = states.max_num_reqs * states.settings.window
            self.rows_N = torch.empty(positions + ROWS + 1, dtype=torch.int64, device=states.device)
        else:
            self.sample, self.shard = torch_sampling.sample, tensor_parallel.shard
            logit_bytes, self.noise_factor = CPU_LOGIT_BYTES, NOISE_FACTOR
        self.rows_per_chunk = max(1, logit_bytes // (4 * states.vocab_size))

    def add_request(self, slot: int) -> None:
        if self.bounds is not None:
            block_size = int(self.states.block_size_S[slot])
            resumed = slot in self.states.resumed
            known = self.states.settings.window if resumed else block_size
            self.bounds.start(slot, known, block_size)

    def reserve_memory(self, hidden_TH: Tensor) -> None:
        """Take the memory of one chunk of logits, and of a request sampler that draws beside it."""
        logits_NV = self.project(hidden_TH[: self.rows_per_chunk])
        if self.bounds is not None:
            own_NV = logits_NV[: self.states.settings.window].float()
            sampling = Sampling.greedy(len(own_NV), own_NV.device)
            sampling.temperature_R += 1
            mask_id, seed_N = self.states.mask_id, sampling.seed_R
            torch_sampling.sample_drawn(own_NV, mask_id, sampling, seed_N, seed_N)

    def __call__(self, masked_DW: Tensor, queries: Queries) -> tuple[Tensor, Tensor]:
        """Sample at the masked positions.

        Returns:
            Token (int64) and confidence (float32) [D, W]; 0 at other positions.
        """
        states = self.states
        rows, end_D = self._rows(masked_DW, queries)
        spans = self._spans(end_D, queries)
        for sampler in queries.samplers.values():
            sampler.begin_forward()
        slot_N = queries.slot_D[rows.request_N]
        hidden_NH = self._hidden(rows, slot_N, queries)
        sample_rows = self._sample_shards if self.sharded else self._sample_whole
        token_N, confidence_N = sample_rows(hidden_NH, slot_N, rows.column_N, spans)
        if self.simulate is not None:
            forward_N = states.window.forward_R[slot_N]
            confidence_N = simulated_confidence(rows.request_N, forward_N, self.simulate)
        shape = (masked_DW.shape[0], masked_DW.shape[1])
        return scatter(rows, token_N, shape), scatter(rows, confidence_N, shape)

    def record(self, queries: Queries, window: Window) -> None:
        """Count what is masked after the step, for the bounds of the next one."""
        if self.bounds is not None:
            self.bounds.record(queries.slots, window.masked_RW.sum(1))

    def _rows(
        self, masked_DW: Tensor, queries: Queries
    ) -> tuple[MaskedRows, NDArray[np.int64] | None]:
        """List the masked positions, and where each request's rows end if the host needs it."""
        in_order = any(sampler.decoder is not None for sampler in queries.samplers.values())
        if self.bounds is not None:
            # A query of asynchronous scheduling may be wider than a window.
            width_D = np.minimum(queries.width_D, masked_DW.shape[1])
            bound_D = self.bounds.bound(queries.slots, width_D)
            if not in_order:
                rows = bounded_rows(masked_DW, bound_D, ROWS, self.rows_N)
                return rows, bound_D.cumsum()
        rows, end_D = exact_rows(masked_DW), None
        if queries.samplers or (self.sharded and self.states.truncating):
            end_D = masked_DW.sum(1).cumsum(0).cpu().numpy()
        return rows, end_D

    def _spans(self, end_D: NDArray[np.int64] | None, queries: Queries) -> list[Span]:
        """Find the rows that need whole logits: of request samplers, and with top_k or top_p."""
        if end_D is None:
            return []
        truncating = self.states.truncating if self.sharded else ()
        return [
            Span(slot, queries.samplers.get(d), int(end_D[d - 1]) if d else 0, int(end_D[d]))
            for d, slot in enumerate(queries.slots)
            if d in queries.samplers or slot in truncating
        ]

    def _hidden(self, rows: MaskedRows, slot_N: Tensor, queries: Queries) -> Tensor:
        """Take the outputs that predict the rows' positions."""
        source_N = queries.first_D[rows.request_N] + rows.column_N
        if not self.states.logits_shift:
            return queries.hidden_TH.index_select(0, source_N)
        # Position i is predicted at i - 1. For the first position of a window that is the last one
        # before it, whose output is kept from an earlier forward unless it is in this one.
        output_TH, kept_SH = queries.hidden_TH, self.states.last_hidden_SH
        inside_N = source_N > queries.begin_D[rows.request_N]
        row_N = torch.where(inside_N, source_N - 1, slot_N + len(output_TH))
        # One copy and `index_select` take a ninth of the time of two indexings and a `where`.
        return torch.cat((output_TH, kept_SH)).index_select(0, row_N)

    def _sample_whole(
        self, hidden_NH: Tensor, slot_N: Tensor, column_N: Tensor, spans: list[Span]
    ) -> tuple[Tensor, Tensor]:
        """Sample from logits of the whole vocabulary."""
        window, mask_id = self.states.window, self.states.mask_id
        token_N, confidence_N = _empty(column_N)
        for at in range(0, len(hidden_NH), self.rows_per_chunk):
            chunk = slice(at, at + self.rows_per_chunk)
            logits_NV = self.project(hidden_NH[chunk])
            sampling = self._sampling(slot_N[chunk], column_N[chunk])
            token_N[chunk], confidence_N[chunk] = self.sample(
                logits_NV, mask_id, *sampling, entropy_N=self._by_entropy(slot_N[chunk])
            )
            for slot, sampler, begin, end in spans:
                # A chunk may end among the rows of one request.
                rows = slice(max(begin, at), min(end, at + self.rows_per_chunk))
                if sampler is not None and rows.start < rows.stop:
                    token_N[rows], confidence_N[rows] = sampler.sample(
                        logits_NV[rows.start - at : rows.stop - at].float(),
                        window.start_R[slot] + column_N[rows],
                        window.forward_R[slot],
                        self._answer(slot) if sampler.needs_answer else None,
                    )
        return token_N, confidence_N

    def _sample_shards(
        self, hidden_NH: Tensor, slot_N: Tensor, column_N: Tensor, spans: list[Span]
    ) -> tuple[Tensor, Tensor]:
        """Sample from this rank's logits, and from whole logits in the rows of `spans`."""
        if spans:
            return self._split(hidden_NH, slot_N, column_N, spans)
        states = self.states
        token_N, confidence_N = _empty(column_N)
        step = self.rows_per_chunk
        if states.drawing:
            step = max(1, step // self.noise_factor)
        for at in range(0, len(hidden_NH), step):
            chunk = slice(at, at + step)
            token_N[chunk], confidence_N[chunk] = tensor_parallel.sample_sharded(
                self.shard,
                self.project_shard(hidden_NH[chunk]),
                states.mask_id,
                self.first_token,
                gather_ranks,
                *self._sampling(slot_N[chunk], column_N[chunk]),
                entropy_N=self._by_entropy(slot_N[chunk]),
            )
        return token_N, confidence_N

    def _split(
        self, hidden_NH: Tensor, slot_N: Tensor, column_N: Tensor, spans: list[Span]
    ) -> tuple[Tensor, Tensor]:
        """Sample the rows of `spans` and all others apart."""
        token_N, confidence_N = _empty(column_N)
        whole_N = np.zeros(len(column_N), dtype=bool)
        moved, end = [], 0
        for span in spans:
            whole_N[span.begin : span.end] = True
            begin, end = end, end + span.end - span.begin
            moved.append(span._replace(begin=begin, end=end))
        for sample_rows, chosen_N, some in (
            (self._sample_whole, whole_N, moved),
            (self._sample_shards, ~whole_N, list[Span]()),
        ):
            row_M = async_tensor_h2d(np.flatnonzero(chosen_N), device=hidden_NH.device)
            token_N[row_M], confidence_N[row_M] = sample_rows(
                hidden_NH[row_M], slot_N[row_M], column_N[row_M], some
            )
        return token_N, confidence_N

    def _sampling(
        self, slot_N: Tensor, column_N: Tensor
    ) -> tuple[()] | tuple[Sampling, Tensor, Tensor]:
        """Collect what drawing needs: settings, answer positions and forwards of the rows."""
        if not self.states.drawing:
            return ()
        window = self.states.window
        position_N = window.start_R[slot_N] + column_N
        return self.states.sampling.rows(slot_N), position_N, window.forward_R[slot_N]

    def _by_entropy(self, slot_N: Tensor) -> Tensor | None:
        """Find the rows whose confidence is exp(-entropy), if a request has this rule."""
        window = self.states.window
        if "entropy" not in window.rules:
            return None
        return window.rule_R1[slot_N, 0] == NUMBER["entropy"]

    def _answer(self, slot: int) -> Tensor:
        """Collect the decoded tokens of an answer; the vocabulary's size where there is none."""
        window, nothing = self.states.window, self.states.vocab_size
        start = window.start_R[slot]
        known_L = self.token_ids_SL[slot, int(self.states.prompt_len_S[slot]) :]
        # Tokens behind the committed ones may have been emitted; the window has them too.
        committed_L = torch.arange(len(known_L), device=known_L.device) < start
        # Columns before position 0 hold the end of the prompt.
        decoded_W = window.decoded_RW[slot] & (window.column_W + start >= 0)
        return torch.cat(
            (
                torch.where(committed_L, known_L.long(), nothing),
                torch.where(decoded_W, window.tokens_RW[slot], nothing),
            )
        )


def gather_ranks(bits_NC: Tensor) -> Tensor:
    """Gather int32 [N, C] of all tensor-parallel ranks to [P, N, C].

    The bits travel as float32, because vLLM's gather over shared memory on a CPU takes floating
    types only; it does not look at them.
    """
    moved = tensor_model_parallel_all_gather(bits_NC.view(torch.float32), dim=0)
    return moved.view(torch.int32).view(-1, *bits_NC.shape)


def _empty(column_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(column_N), torch.empty_like(column_N, dtype=torch.float32)
