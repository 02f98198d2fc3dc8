# SPDX-License-Identifier: Apache-2.0
"""What the worker keeps per request.

A slot is the runner's row number of a request. A preempted request loses its slot and its pages but
not its window: `preempt` puts the window aside by request id, and `add` takes it up again, so the
answer does not depend on preemptions.

Shape suffixes: S slots, W window positions, H hidden.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData

from vllm_d2f.admission import MAX_END_TOKENS, end_tokens
from vllm_d2f.blocks import NO_PROMPT_END
from vllm_d2f.d2f import Beginning, D2FParams, Window, add
from vllm_d2f.sampling.request_sampler import RequestSampler, in_order, make_request_sampler
from vllm_d2f.sampling.sample import Sampling
from vllm_d2f.settings import (
    request_params,
    served_settings,
    wants_adaptive_window,
    wants_trace,
)
from vllm_d2f.worker.grammar import Grammars

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Preempted(NamedTuple):
    """What is put aside while a request has no slot."""

    window: Window
    sampler: RequestSampler | None


class Staged(NamedTuple):
    """A request that has taken a slot, and whose tensors are not written yet."""

    slot: int
    data: NewRequestData
    beginning: Beginning
    seed: int
    preempted: Preempted | None


class RequestStates:
    """Tensors by slot on the device, and sets of slots on the host.

    As in vLLM's own states, `add` only takes note of a request, and `apply_staged_writes` writes
    the tensors of all requests that have come since, together.

    Attributes:
        window: the windows.
        sampling: temperature and so on.
        last_hidden_SH: the output at the position before each window, which predicts its first one.
        prompt_len_S: tokens of the prompt, on the host.
        origin_S: the position from which blocks are counted, on the host: the end of the prompt,
            or 0; `NO_PROMPT_END` in a free slot.
        block_size_S: positions per block, on the host.
        drawing: slots with a temperature. Greedy decoding runs no code for drawing.
        truncating: those of them that have top_k or top_p.
        rules: the acceptance rule of each slot in use.
        samplers: samplers of requests that have their own. Their slots are not in `drawing`.
        traced: slots of requests with `d2f_trace`.
        adaptive: slots of requests of whose windows a forward may compute a part.
        resumed: slots that came back from a preemption and have not been completed by
            `D2FSampler.apply_staged_writes`.
        slots: the slot of each request id.
        preempted: what was put aside, by request id.
        staged: requests whose tensors are not written yet.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device) -> None:
        model_config = vllm_config.model_config
        self.device = device
        self.settings = served_settings(model_config)
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        # vLLM may still reduce the model's length when it knows how much memory there is.
        self.model_config = model_config
        self.async_scheduling = bool(vllm_config.scheduler_config.async_scheduling)
        self.vocab_size = model_config.get_vocab_size()
        self.mask_id: int = model_config.hf_config.mask_token_id
        self.logits_shift: bool = model_config.hf_config.logits_shift
        self.origin_zero = self.settings.block_origin == "zero"
        self.grammars = Grammars(vllm_config, self.mask_id)

        slots = self.max_num_reqs
        self.window = Window.empty(
            slots, self.settings.window, MAX_END_TOKENS, self.mask_id, device
        )
        self.sampling = Sampling.greedy(slots, device)
        self.last_hidden_SH = torch.zeros(
            slots,
            model_config.get_hidden_size(),
            dtype=cast(torch.dtype, model_config.dtype),
            device=device,
        )
        self.prompt_len_S = np.zeros(slots, dtype=np.int64)
        self.origin_S = np.full(slots, NO_PROMPT_END)
        self.block_size_S = np.ones(slots, dtype=np.int64)
        self.drawing: set[int] = set()
        self.truncating: set[int] = set()
        self.rules: dict[int, str] = {}
        self.samplers: dict[int, RequestSampler] = {}
        self.traced: set[int] = set()
        self.adaptive: set[int] = set()
        self.resumed: set[int] = set()
        self.slots: dict[str, int] = {}
        self.preempted: dict[str, Preempted] = {}
        self.staged: list[Staged] = []

    def add(self, slot: int, data: NewRequestData) -> None:
        """Let a request take a slot, with a new window or the one that was put aside."""
        sampling = data.sampling_params
        assert sampling is not None and sampling.max_tokens is not None
        params = request_params(self.settings, sampling.extra_args)
        if in_order(sampling) or self.settings.simulate_tokens_per_forward:
            params = replace(params, sub_block_size=0)  # the order is that of the text
        prompt, prompt_len = data.prompt_token_ids or [], data.prompt_len
        # Counted from position 0, the prompt's last tokens may share a block with the answer.
        tail = prompt[prompt_len - prompt_len % params.block_size :] if self.origin_zero else ()
        self.slots[data.req_id] = slot
        self.prompt_len_S[slot] = prompt_len
        self.origin_S[slot] = 0 if self.origin_zero else prompt_len
        self.block_size_S[slot] = params.block_size
        if sampling.temperature > 0:
            self.drawing.add(slot)
            if sampling.top_k > 0 or sampling.top_p < 1:
                self.truncating.add(slot)
        if wants_trace(sampling.extra_args):
            self.traced.add(slot)
        if wants_adaptive_window(self.settings, sampling.extra_args):
            self.adaptive.add(slot)
        beginning = Beginning(
            params,
            max_tokens=sampling.max_tokens,
            limit=self.model_config.max_model_len - prompt_len,
            ends=end_tokens(sampling),
            tail=tail,
        )
        # A request without a seed takes the engine's next one, which is the same on every rank.
        seed = int(torch.randint(1 << 62, ())) if sampling.seed is None else sampling.seed
        preempted = self.preempted.pop(data.req_id, None)
        if preempted is not None:
            self.resumed.add(slot)
        self.staged.append(Staged(slot, data, beginning, seed, preempted))

    def apply_staged_writes(self) -> None:
        """Write the tensors of all requests that were added since the last call."""
        if not self.staged:
            return
        staged, self.staged = self.staged, []
        slots = [one.slot for one in staged]
        index_R = async_tensor_h2d(slots, device=self.device, dtype=torch.int64)
        self.window.start(slots, [one.beginning for one in staged], self.mask_id)
        sampling = self._sampling(staged)
        self.sampling.put(index_R, sampling)
        window = self.window.rows(index_R)
        add(window)
        self.window.put(index_R, window)
        for r, (slot, data, beginning, _, preempted) in enumerate(staged):
            self._set_rule(slot, beginning.params.accept)
            if preempted is None:
                sampler = self._make_sampler(data, beginning.params, sampling.rows(slice(r, r + 1)))
            else:
                sampler = preempted.sampler
                self.window.put(self.row(slot), preempted.window)
            if sampler is not None:
                self.samplers[slot] = sampler
                self.drawing.discard(slot)
                self.truncating.discard(slot)

    def preempt(self, req_id: str) -> None:
        """Put a request aside, unless it has finished before."""
        slot = self.slots.pop(req_id, None)
        if slot is not None:
            window = self.window.rows(self.row(slot))
            self.preempted[req_id] = Preempted(window, self.samplers.get(slot))
            self._free(slot)

    def finish(self, req_id: str) -> None:
        """Forget a request, wherever it is."""
        self.preempted.pop(req_id, None)
        slot = self.slots.pop(req_id, None)
        if slot is not None:
            self._free(slot)

    def row(self, slot: int) -> torch.Tensor:
        """Index one slot, with a tensor that is filled on the device: a copy would wait for it."""
        return torch.full((1,), slot, dtype=torch.int64, device=self.device)

    def _sampling(self, staged: Sequence[Staged]) -> Sampling:
        """Return the sampling settings of the requests, on the device."""
        params = [(one.data.sampling_params, one.seed) for one in staged]
        floats = [(p.temperature, p.top_p, p.min_p) for p, _ in params if p is not None]
        # The seed of an answer of several is the request's plus its number, and may leave int64.
        integers = [
            (max(p.top_k, 0), (seed + (1 << 63)) % (1 << 64) - (1 << 63))
            for p, seed in params
            if p is not None
        ]
        temperature_R, top_p_R, min_p_R = async_tensor_h2d(
            torch.tensor(floats, dtype=torch.float32).T, device=self.device
        )
        top_k_R, seed_R = async_tensor_h2d(torch.tensor(integers).T, device=self.device)
        return Sampling(temperature_R, top_k_R, top_p_R, min_p_R, seed_R)

    def _make_sampler(
        self, data: NewRequestData, params: D2FParams, one: Sampling
    ) -> RequestSampler | None:
        sampling = data.sampling_params
        assert sampling is not None
        structured = sampling.structured_outputs is not None
        return make_request_sampler(
            sampling,
            prompt=data.prompt_token_ids or (),
            sampling=one,
            ends=end_tokens(sampling),
            d2f=params,
            mask_id=self.mask_id,
            vocab_size=self.vocab_size,
            window=self.settings.window,
            grammar=self.grammars.constraint(sampling) if structured else None,
            logprobs_mode=self.model_config.logprobs_mode,
            device=self.device,
        )

    def _set_rule(self, slot: int, rule: str | None) -> None:
        """Keep the rules of all requests: a step computes no other."""
        if rule is None:
            self.rules.pop(slot, None)
        else:
            self.rules[slot] = rule
        self.window.rules = frozenset(self.rules.values())

    def _free(self, slot: int) -> None:
        self._set_rule(slot, None)
        self.origin_S[slot] = NO_PROMPT_END
        for slots in (self.drawing, self.truncating, self.traced, self.adaptive, self.resumed):
            slots.discard(slot)
        self.samplers.pop(slot, None)
