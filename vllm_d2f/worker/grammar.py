# SPDX-License-Identifier: Apache-2.0
"""Structured outputs: a grammar that follows a request's decoded tokens.

vLLM compiles every request's grammar in the scheduler's process, lets it judge draft tokens and
sends a bitmask per draft position. The positions of a window depend on each other, so under D2F
the worker keeps a grammar of its own, which the same backend compiles from the same request. It
decodes in the order of the text (`sampling.constraints`). The scheduler's grammar then only
confirms the tokens that are emitted.
"""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

logger = init_logger(__name__)


class GrammarConstraint:
    """Allows the tokens that the grammar allows after the decoded text (a `Constraint`)."""

    def __init__(
        self,
        grammar: "StructuredOutputGrammar | None",
        bitmask_1B: Tensor,
        mask_id: int,
        *,
        specials: Iterable[int] = (),
        min_tokens: int = 0,
        stops: Iterable[int] = (),
    ) -> None:
        """
        Args:
            grammar: at its start; None: it could not be compiled, and the answer ends.
            bitmask_1B: int32, one row as its backend allocates it, to write into.
            mask_id: the mask token: text to some backends, never allowed here.
            specials: the tokenizer's special tokens. To xgrammar they are text like any other, but
                the detokenizer drops them, and the remaining text may not match any more.
            min_tokens, stops: no stop token before so many tokens.

        Special and early stop tokens are allowed where the grammar allows nothing else. Where it
        allows nothing at all (a rule that `admission.check_grammar` has missed), a stop token is
        sampled. The scheduler's grammar rejects it, and vLLM ends this request with an error, and
        no other.
        """
        self.grammar, self.bitmask_1B, self.mask_id = grammar, bitmask_1B, mask_id
        self.lost = grammar is None
        self.stops, self.min_tokens, self.accepted = sorted(stops), min_tokens, 0
        self.specials = sorted(set(specials) - set(self.stops))

    def forbid(self, logits_V: Tensor) -> None:
        if self.grammar is None:
            self.bitmask_1B.zero_()
        elif self.grammar.is_terminated():
            return  # behind an ignored end token everything is allowed
        else:
            self.grammar.fill_bitmask(self.bitmask_1B, 0)
        bits = np.unpackbits(self.bitmask_1B.numpy().view(np.uint8)[0], bitorder="little")
        allowed_V = np.zeros(len(logits_V), dtype=bool)
        bits = bits[: len(allowed_V)]
        allowed_V[: len(bits)] = bits
        allowed_V[self.mask_id] = False
        if self.lost or not allowed_V.any():
            self.lost = True
            allowed_V[:] = False
            allowed_V[self.stops[:1] or 0] = True
        allowed_V = _without(allowed_V, self.specials)
        if self.accepted < self.min_tokens:
            allowed_V = _without(allowed_V, self.stops)
        forbidden_V = async_tensor_h2d(~allowed_V, device=logits_V.device)
        logits_V.masked_fill_(forbidden_V, -torch.inf)

    def accept(self, token: int) -> None:
        self.accepted += 1
        # Never raise: an exception would end the engine, and with it all requests.
        if self.lost or self.grammar is None:
            return
        if not self.grammar.accept_tokens("", [token]):
            logger.error(
                "vllm-d2f: the grammar allowed token %d and then did not accept it. This is a bug; "
                "please report it with the request's structured_outputs.",
                token,
            )
            self.lost = True


class Grammars:
    """Compiles the grammars of a worker's requests."""

    def __init__(self, vllm_config: "VllmConfig", mask_id: int) -> None:
        self.vllm_config, self.mask_id = vllm_config, mask_id
        self._manager: StructuredOutputManager | None = None

    def constraint(self, params: "SamplingParams") -> GrammarConstraint:
        """Compile the grammar of a request that `wire.send_grammar_backend` has seen.

        The scheduler compiled the same grammar before it admitted the request. This succeeds too,
        unless it takes longer than vLLM's limit (`VLLM_REGEX_COMPILATION_TIMEOUT_S`) and did not
        before; then this request ends with an error, and no other.
        """
        from vllm.v1.structured_output import StructuredOutputManager
        from vllm.v1.structured_output.request import StructuredOutputRequest

        if self._manager is None:
            self._manager = StructuredOutputManager(self.vllm_config)
            # The request waits for its grammar in either case.
            self._manager._use_async_grammar_compilation = False
        structured = StructuredOutputRequest.from_sampling_params(params)
        assert structured is not None
        request: Any = SimpleNamespace(
            request_id="", sampling_params=params, structured_output_request=structured
        )
        self._manager.grammar_init(request)
        grammar = structured.grammar
        if isinstance(grammar, Exception):
            logger.error("vllm-d2f: a grammar was compiled, and then was not: %s", grammar)
            grammar = None
        assert self._manager.backend is not None
        return GrammarConstraint(
            grammar,
            self._manager.backend.allocate_token_bitmask(1),
            self.mask_id,
            specials=self._manager.tokenizer.all_special_ids,
            min_tokens=params.min_tokens,
            stops=params.all_stop_token_ids,
        )


def _without(allowed_V: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Forbid these tokens too, unless that leaves nothing."""
    fewer_V = allowed_V.copy()
    fewer_V[tokens] = False
    return fewer_V if fewer_V.any() else allowed_V
