# SPDX-License-Identifier: Apache-2.0
"""What an admitted request may still bring, and what must not end the engine for all others."""

from types import SimpleNamespace

import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_d2f.worker.grammar import GrammarConstraint, Grammars
from vllm_d2f.worker.request_states import RequestStates, Staged


def test_the_seed_of_a_further_answer_may_leave_int64():
    """vLLM gives answer number i of a request its seed plus i, and checks the first one only."""
    states = SimpleNamespace(device=torch.device("cpu"))
    params = SimpleNamespace(sampling_params=SamplingParams(temperature=1.0))
    seeds = ((1 << 63) - 1, 1 << 63, -(1 << 63), 7)
    staged = [Staged(slot, params, None, seed, None) for slot, seed in enumerate(seeds)]
    found = RequestStates._sampling(states, staged).seed_R.tolist()
    assert found == [(1 << 63) - 1, -(1 << 63), -(1 << 63), 7]


class Manager:
    """A manager of grammars that cannot compile this one any more."""

    backend = SimpleNamespace(
        allocate_token_bitmask=lambda rows: torch.full((rows, 1), -1, dtype=torch.int32)
    )
    tokenizer = SimpleNamespace(all_special_ids=[])

    def grammar_init(self, request):
        request.structured_output_request.grammar = ValueError("Regex compilation timed out")


def test_a_grammar_that_compiles_once_and_then_not_ends_its_own_answer(caplog):
    grammars = Grammars(SimpleNamespace(), mask_id=1)
    grammars._manager = Manager()
    structured = StructuredOutputsParams(regex="a*")
    params = SamplingParams(structured_outputs=structured, stop_token_ids=[3])
    constraint = grammars.constraint(params)
    assert isinstance(constraint, GrammarConstraint) and "timed out" in caplog.text
    for _ in range(2):
        logits_V = torch.zeros(8)
        constraint.forbid(logits_V)
        assert logits_V.isfinite().nonzero()[:, 0].tolist() == [3]
        constraint.accept(3)
