# SPDX-License-Identifier: Apache-2.0
"""Proposals of a request that asks for more than temperature, top_p, top_k, min_p and a seed.

Such a request proposes by itself, in float32, and does not depend on who shares the batch. The
others are proposed for together and pay nothing for it. Engine and reference use the same class.

Shape suffixes: N rows (undecided positions in the order of the text), V vocabulary, T answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_d2f.sampling.constraints import BadWords, Constraint, LeftToRight
from vllm_d2f.sampling.logits_processors import LogitProcessor, LogitRules
from vllm_d2f.sampling.logprobs import LogprobStore
from vllm_d2f.sampling.sample import Sampling, propose_drawn, propose_greedy


@dataclass(slots=True)
class Proposer:
    """How one request proposes.

    Attributes:
        mask_id: the mask token, which is never proposed.
        sampling: one entry.
        drawn: whether it has a temperature.
        processor: its rules for the logits, or None.
        in_order: its constraints, if it is decided left to right, or None.
        logprobs: where its log-probabilities are kept, or None.
    """

    mask_id: int
    sampling: Sampling
    drawn: bool = False
    processor: LogitProcessor | None = None
    in_order: LeftToRight | None = None
    logprobs: LogprobStore | None = None

    @property
    def needs_answer(self) -> bool:
        """Whether `propose` reads the decided tokens."""
        return self.processor is not None and self.processor.rules.penalise

    def begin(self) -> None:
        """A new forward begins."""
        if self.in_order is not None:
            self.in_order.begin()

    def propose(
        self, logits_NV: Tensor, position_N: Tensor, forward_1: Tensor, answer_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and confidences at rows of this forward; rows may come in several calls.

        Args:
            logits_NV: float32, changed.
            position_N: int64, positions in the answer.
            forward_1: int64, the number of forwards the request has had.
            answer_T: see `LogitProcessor.apply`.

        Returns:
            token_N (int64) and confidence_N (float32), negative where the position must wait.
        """
        logits_NV[:, self.mask_id] = -torch.inf
        raw_NV = logits_NV.clone() if self.logprobs is not None else logits_NV
        if self.processor is not None:
            self.processor.apply(logits_NV, position_N, answer_T)

        def choose(rows: slice) -> tuple[Tensor, Tensor]:
            chosen_NV = logits_NV[rows]
            if not self.drawn:
                return propose_greedy(chosen_NV, self.mask_id)
            each_N = torch.zeros(len(chosen_NV), dtype=torch.int64, device=chosen_NV.device)
            return propose_drawn(
                chosen_NV,
                self.mask_id,
                self.sampling.rows(each_N),
                position_N[rows],
                forward_1.expand(len(chosen_NV)),
            )

        if self.in_order is None:
            token_N, confidence_N = choose(slice(None))
        else:
            token_N, confidence_N = self.in_order.walk(
                logits_NV, lambda row: choose(slice(row, row + 1))
            )
        if self.logprobs is not None:
            self.logprobs.write(raw_NV, position_N, token_N)
        return token_N, confidence_N


def make_proposer(
    params: Any,
    *,
    prompt: Sequence[int],
    sampling: Sampling,
    ends: Sequence[int],
    tau_conf: float,
    mask_id: int,
    vocab_size: int,
    window: int,
    grammar: Constraint | None = None,
    logprobs_mode: str = "raw_logprobs",
    device: torch.device | str = "cpu",
) -> Proposer | None:
    """The proposer of a request, or None if it asks for nothing of the kind.

    Args:
        params: vLLM's `SamplingParams`, checked (`admission.check_sampling_params`).
        prompt: its tokens.
        sampling: one entry: temperature and so on.
        ends: tokens that end the answer.
        tau_conf: the request's confidence threshold.
        window: positions of the widest window.
        grammar: of its structured output.
    """
    rules = LogitRules.of(params)
    if grammar is not None:
        # The grammar applies min_tokens itself: it knows when nothing but the end is left.
        rules = replace(rules, min_tokens=0)
    phrases = [word for word in params.bad_words_token_ids or () if len(word) > 1]
    constraints: list[Constraint] = [] if grammar is None else [grammar]
    if phrases:
        constraints.append(BadWords(phrases))
    num_logprobs = params.num_logprobs
    if rules.empty and not constraints and num_logprobs is None:
        return None
    processor = logprobs = in_order = None
    if not rules.empty:
        prompt_P = torch.tensor(prompt, dtype=torch.int64)
        processor = LogitProcessor(rules, prompt_P, vocab_size, device)
    if num_logprobs is not None:
        num = vocab_size if num_logprobs == -1 else num_logprobs
        token_ids = params.logprob_token_ids
        logprobs = LogprobStore(window, num, token_ids, logprobs_mode, device)
    if constraints:
        in_order = LeftToRight(constraints, tau_conf, ends)
    drawn = params.temperature > 0
    return Proposer(mask_id, sampling, drawn, processor, in_order, logprobs)
