# SPDX-License-Identifier: Apache-2.0
"""How sampling parameters change a request's logits before its tokens are sampled.

The order is vLLM's: `allowed_token_ids`, `logit_bias`, `min_tokens`, penalties, and then bad words
of one token. Temperature, min_p, top_k and top_p come after them (`sample`).

Under D2F many positions are masked at once, so the text "so far" is what was decoded when the
forward ran. Penalties count the prompt and every decoded token of the answer, wherever in the
window it is; `min_tokens` goes by the position in the answer.

Shape suffixes: N rows (one masked position each), V vocabulary, P prompt, T answer positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_d2f.window import to_device


@dataclass(frozen=True, slots=True)
class LogitRules:
    """The rules of one request.

    Attributes:
        allowed: tokens that may be sampled; None for all.
        bias: (token, number added to its logit) pairs.
        banned: tokens that are never sampled: the bad words of a single token.
        min_tokens: answer positions below this one get none of `stops`.
        stops: the tokens that end the request.
        repetition: divides positive and multiplies negative logits of tokens that occur in the
            prompt or the answer; 1 for no penalty.
        presence: is subtracted from the logits of tokens that occur in the answer; 0 for none.
        frequency: the same, times the number of their occurrences; 0 for none.
    """

    allowed: tuple[int, ...] | None = None
    bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    min_tokens: int = 0
    stops: tuple[int, ...] = ()
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @classmethod
    def of(cls, params: Any) -> "LogitRules":
        """Take the rules from vLLM's `SamplingParams`."""
        words = params.bad_words_token_ids or ()
        return cls(
            allowed=tuple(params.allowed_token_ids) if params.allowed_token_ids else None,
            bias=tuple((params.logit_bias or {}).items()),
            banned=tuple(word[0] for word in words if len(word) == 1),
            min_tokens=params.min_tokens,
            stops=tuple(sorted(params.all_stop_token_ids)),
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )

    @property
    def penalise(self) -> bool:
        """Whether the rules depend on the decoded tokens."""
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0

    @property
    def stops_wait(self) -> bool:
        """Whether the first positions must not get an end token."""
        return self.min_tokens > 0 and bool(self.stops)

    @property
    def empty(self) -> bool:
        """Whether the logits stay as they are."""
        fixed = self.allowed is not None or self.bias or self.banned
        return not (fixed or self.penalise or self.stops_wait)


class LogitProcessor:
    """Applies one request's rules to its rows. Decoding does not change its state."""

    def __init__(
        self, rules: LogitRules, prompt_P: Tensor, vocab_size: int, device: torch.device | str
    ) -> None:
        """`prompt_P` holds the prompt's tokens (int64, on the host)."""
        self.rules, self.vocab_size = rules, vocab_size
        self.added_V: Tensor | None = None
        if rules.allowed is not None or rules.bias or rules.banned:
            added_V = torch.zeros(vocab_size, dtype=torch.float32)
            if rules.allowed is not None:
                added_V.fill_(-torch.inf)
                added_V[list(rules.allowed)] = 0
            if rules.bias:
                tokens, biases = zip(*rules.bias, strict=True)
                added_V[list(tokens)] += torch.tensor(biases)
            added_V[list(rules.banned)] = -torch.inf
            self.added_V = to_device(added_V, device)
        self.stops_E = to_device(torch.tensor(rules.stops, dtype=torch.int64), device)
        self.in_prompt_V: Tensor | None = None
        if rules.repetition != 1:
            in_prompt_V = torch.zeros(vocab_size, dtype=torch.bool)
            in_prompt_V[prompt_P] = True
            self.in_prompt_V = to_device(in_prompt_V, device)

    def apply(self, logits_NV: Tensor, position_N: Tensor, answer_T: Tensor | None) -> None:
        """Change float32 logits in place.

        Args:
            position_N: int64, each row's position in the answer.
            answer_T: int64, the decoded tokens of the answer in any order, and `vocab_size` at
                positions that are masked. Read only if `rules.penalise`.
        """
        rules = self.rules
        if self.added_V is not None:
            logits_NV += self.added_V
        if rules.stops_wait:
            early_N1 = (position_N < rules.min_tokens)[:, None]
            stop_NE = logits_NV[:, self.stops_E]
            logits_NV[:, self.stops_E] = stop_NE.masked_fill(early_N1, -torch.inf)
        if not rules.penalise:
            return
        assert answer_T is not None
        count_V = torch.zeros(self.vocab_size + 1, dtype=torch.float32, device=logits_NV.device)
        count_V.scatter_add_(0, answer_T, torch.ones_like(answer_T, dtype=torch.float32))
        count_V = count_V[:-1]
        there_V = count_V > 0
        if self.in_prompt_V is not None:
            r = rules.repetition
            weaker_NV = torch.where(logits_NV > 0, logits_NV / r, logits_NV * r)
            logits_NV.copy_(torch.where(there_V | self.in_prompt_V, weaker_NV, logits_NV))
        logits_NV -= rules.frequency * count_V + rules.presence * there_V
