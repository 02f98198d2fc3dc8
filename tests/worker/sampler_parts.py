# SPDX-License-Identifier: Apache-2.0
"""A sampler without an engine: real request states of a made-up configuration, and a head.

With `cuda=True` a sampler is composed as on CUDA and runs on CPU tensors, with the definition of
the Triton kernel in the kernel's place (`composed_as_on_cuda`).
"""

from dataclasses import replace
from types import SimpleNamespace

import torch

from vllm_d2f.sampling import confidence_kernel, tensor_parallel
from vllm_d2f.sampling.sample import Sampling, sample_drawn, sample_greedy
from vllm_d2f.worker import proposals
from vllm_d2f.worker.request_states import RequestStates


class Event:
    """A copy that is done when it is waited for."""

    def record(self):
        pass

    def synchronize(self):
        pass


def stand_in(logits, mask_id, sampling=None, position=None, forward=None, *, entropy_N=None):
    """Do what `confidence_kernel.sample` does, for all rows alike, without waiting for a device."""
    token, value = sample_greedy(logits.clone(), mask_id, entropy_N)
    if sampling is None:
        return token, value
    drawn = sampling.temperature_R > 0
    every = Sampling(**{name: getattr(sampling, name) for name in Sampling.__dataclass_fields__})
    every.temperature_R = torch.where(drawn, sampling.temperature_R, 1.0)
    other, chance = sample_drawn(logits, mask_id, every, position, forward, entropy_N)
    return torch.where(drawn, other, token), torch.where(drawn, chance, value)


def composed_as_on_cuda(monkeypatch, shard=tensor_parallel.shard):
    """Let `cuda=True` run on a CPU."""
    monkeypatch.setattr(proposals, "missing", lambda device: None)
    monkeypatch.setattr(confidence_kernel, "sample", stand_in)
    monkeypatch.setattr(confidence_kernel, "shard", shard)
    monkeypatch.setattr(torch.cuda, "Event", Event)


def make_states(
    device,
    *,
    slots,
    width,
    hidden,
    vocabulary,
    mask,
    length=200,
    shift=False,
    ahead=False,
    origin="prompt_end",
):
    """Make real states. Blocks have 8 positions unless a request says otherwise."""
    hf_config = SimpleNamespace(
        d2f={"block_size": 8, "max_blocks": width // 8, "window": width},
        family=None,
        mask_token_id=mask,
        logits_shift=shift,
    )
    model_config = SimpleNamespace(
        hf_config=hf_config,
        max_model_len=length,
        dtype=torch.float32,
        logprobs_mode="raw_logprobs",
        get_vocab_size=lambda: vocabulary,
        get_hidden_size=lambda: hidden,
    )
    scheduler_config = SimpleNamespace(max_num_seqs=slots, async_scheduling=ahead)
    config = SimpleNamespace(model_config=model_config, scheduler_config=scheduler_config)
    states = RequestStates(config, torch.device(device))
    states.settings = replace(states.settings, block_origin=origin)
    states.origin_zero = origin == "zero"
    return states


class Head:
    """A language-model head, or one rank's view of it; it notes how many rows it is called with."""

    def __init__(self, head_HV, begin=0, end=None):
        self.head_HV, self.first_token = head_HV, begin
        self.end = head_HV.shape[1] if end is None else end
        self.whole, self.sharded = [], []

    def project(self, hidden_NH):
        self.whole.append(len(hidden_NH))
        return hidden_NH @ self.head_HV

    def project_shard(self, hidden_NH):
        self.sharded.append(len(hidden_NH))
        return (hidden_NH @ self.head_HV)[:, self.first_token : self.end]
