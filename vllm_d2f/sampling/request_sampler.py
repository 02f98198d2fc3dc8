# SPDX-License-Identifier: Apache-2.0
"""Sampling of a request that has more than temperature, top_p, top_k, min_p and a seed.

Penalties, logit biases, log-probabilities, a grammar: a request with any of these gets a sampler of
its own, which works in float32 and does not depend on the rest of the batch. All other requests are
sampled together, and pay nothing for the feature. Engine and reference use the same class.

Shape suffixes: N rows (masked positions in the order of the text), V vocabulary, T answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_d2f.sampling.constraints import BadWords, Constraint, InOrderDecoder
from vllm_d2f.sampling.logits_processors import LogitProcessor, LogitRules
from vllm_d2f.sampling.logprobs import LogprobStore
from vllm_d2f.sampling.sample import Sampling, sample_drawn, sample_greedy
from vllm_d2f.window import D2FParams


@dataclass(slots=True)
class RequestSampler:
    """Samples for one request.

    Attributes:
        mask_id: the mask token, which is never sampled.
        sampling: one entry.
        drawn: whether the request has a temperature.
        entropy: whether its confidence is exp(-entropy), as its acceptance rule reads it.
        processor: changes its logits, or None.
        decoder: decodes it from left to right, or None if it has no constraints.
        logprobs: keeps its log-probabilities, or None.
    """

    mask_id: int
    sampling: Sampling
    drawn: bool = False
    entropy: bool = False
    processor: LogitProcessor | None = None
    decoder: InOrderDecoder | None = None
    logprobs: LogprobStore | None = None

    @property
    def needs_answer(self) -> bool:
        """Whether `sample` reads the decoded tokens of the answer."""
        return self.processor is not None and self.processor.rules.penalise

    def begin_forward(self) -> None:
        if self.decoder is not None:
            self.decoder.begin_forward()

    def sample(
        self, logits_NV: Tensor, position_N: Tensor, forward_1: Tensor, answer_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sample at rows of this forward, which may come in several calls.

        Args:
            logits_NV: float32; changed.
            position_N: int64, positions in the answer.
            forward_1: int64, the number of forwards the request has had.
            answer_T: see `LogitProcessor.apply`.

        Returns:
            token_N (int64) and confidence_N (float32), `NOT_YET` where the position must wait.
        """
        logits_NV[:, self.mask_id] = -torch.inf
        raw_NV = logits_NV.clone() if self.logprobs is not None else logits_NV
        if self.processor is not None:
            self.processor.apply(logits_NV, position_N, answer_T)

        def sample_rows(rows: slice) -> tuple[Tensor, Tensor]:
            some_NV = logits_NV[rows]
            entropy_N = some_NV.new_ones(len(some_NV), dtype=torch.bool) if self.entropy else None
            if not self.drawn:
                return sample_greedy(some_NV, self.mask_id, entropy_N)
            each_N = torch.zeros(len(some_NV), dtype=torch.int64, device=some_NV.device)
            return sample_drawn(
                some_NV,
                self.mask_id,
                self.sampling.rows(each_N),
                position_N[rows],
                forward_1.expand(len(some_NV)),
                entropy_N,
            )

        if self.decoder is None:
            token_N, confidence_N = sample_rows(slice(None))
        else:
            token_N, confidence_N = self.decoder.decode_in_order(
                logits_NV, lambda row: sample_rows(slice(row, row + 1))
            )
        if self.logprobs is not None:
            self.logprobs.write(raw_NV, position_N, token_N)
        return token_N, confidence_N


def in_order(params: Any) -> bool:
    """Return whether the request is decoded in the order of the text; see `constraints`."""
    return params.structured_outputs is not None or bool(_phrases(params))


def _phrases(params: Any) -> list[Sequence[int]]:
    return [word for word in params.bad_words_token_ids or () if len(word) > 1]


def make_request_sampler(
    params: Any,
    *,
    prompt: Sequence[int],
    sampling: Sampling,
    ends: Sequence[int],
    d2f: D2FParams,
    mask_id: int,
    vocab_size: int,
    window: int,
    grammar: Constraint | None = None,
    logprobs_mode: str = "raw_logprobs",
    device: torch.device | str = "cpu",
) -> RequestSampler | None:
    """Make the sampler of a request, or return None if the request needs none of its own.

    Args:
        params: vLLM's `SamplingParams`, checked (`admission.check_sampling_params`).
        prompt: its token ids.
        sampling: one entry: temperature and so on.
        ends: tokens that end the answer.
        d2f: the request's decoding parameters.
        window: positions of the widest window.
        grammar: the constraint of its structured output.
    """
    rules = LogitRules.of(params)
    if grammar is not None:
        # The grammar applies min_tokens itself: it knows when it allows nothing but the end.
        rules = replace(rules, min_tokens=0)
    phrases = _phrases(params)
    constraints: list[Constraint] = [] if grammar is None else [grammar]
    if phrases:
        constraints.append(BadWords(phrases))
    num_logprobs = params.num_logprobs
    if rules.empty and not constraints and num_logprobs is None:
        return None
    processor = logprobs = decoder = None
    if not rules.empty:
        prompt_P = torch.tensor(prompt, dtype=torch.int64)
        processor = LogitProcessor(rules, prompt_P, vocab_size, device)
    if num_logprobs is not None:
        num = vocab_size if num_logprobs == -1 else num_logprobs
        token_ids = params.logprob_token_ids
        logprobs = LogprobStore(window, num, token_ids, logprobs_mode, device)
    if constraints:
        decoder = InOrderDecoder(constraints, d2f.tau, ends)
    drawn, entropy = params.temperature > 0, d2f.accept == "entropy"
    return RequestSampler(mask_id, sampling, drawn, entropy, processor, decoder, logprobs)
