# SPDX-License-Identifier: Apache-2.0
"""What the reference loop answers a request with any sampling parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from benchmarks.parity import TIE, Answer, load_forward
from vllm_d2f.d2f import D2FParams
from vllm_d2f.reference import Forward, decode
from vllm_d2f.sampling.request_sampler import make_request_sampler
from vllm_d2f.sampling.sample import Sampling
from vllm_d2f.worker.grammar import Grammars


@dataclass(frozen=True)
class Known:
    """What a request must be answered; `tie` if rounding may decide otherwise."""

    answer: Answer
    tie: bool = False


@dataclass(frozen=True)
class Truth:
    """The reference for one model.

    Attributes:
        grammars: compiles structured outputs as the engine's worker does.
        max_len: the server's longest sequence.
        prompt_block: positions per prompt block of a model with a block-causal prompt.
        window: positions of the widest window, for log-probabilities.
    """

    forward: Forward
    config: Any
    grammars: Grammars
    max_len: int
    window: int
    prompt_block: int | None = None

    def answer(self, prompt: Sequence[int], params: D2FParams, sampling: Any) -> Known:
        """Decode one request.

        Args:
            prompt: token ids.
            params: its D2F settings.
            sampling: vLLM's `SamplingParams`, n = 1, with a seed if it draws.
        """
        config = self.config
        stops = list(sampling.stop_token_ids or ())
        ends = stops + ([] if sampling.ignore_eos else list(config.end_token_ids))
        sampling = sampling.clone()
        sampling.all_stop_token_ids.update(ends)
        own = Sampling.greedy(1)
        own.temperature_R[0] = sampling.temperature
        own.top_k_R[0] = max(sampling.top_k, 0)
        own.top_p_R[0] = sampling.top_p
        own.min_p_R[0] = sampling.min_p
        own.seed_R[0] = sampling.seed or 0
        grammar = None
        if sampling.structured_outputs is not None:
            validate_xgrammar_grammar(sampling)  # also writes a choice as a grammar
            sampling.structured_outputs._backend = "xgrammar"
            grammar = self.grammars.constraint(sampling)
        proposer = make_request_sampler(
            sampling,
            prompt=prompt,
            sampling=own,
            ends=ends,
            tau_conf=params.tau_conf,
            mask_id=config.mask_token_id,
            vocab_size=config.vocab_size,
            window=self.window,
            grammar=grammar,
        )
        margin, frame = math.inf, None
        for frame in decode(
            self.forward,
            prompt,
            params,
            max_tokens=sampling.max_tokens,
            mask_id=config.mask_token_id,
            ends=ends,
            shift=config.logits_shift,
            max_len=self.max_len,
            sampling=own,
            prompt_block=self.prompt_block,
            proposer=proposer,
        ):
            margin = min(margin, frame.margin)
        assert frame is not None
        return Known(Answer(tuple(frame.tokens), frame.forward), margin < TIE)


def load_truth(vllm_config: Any, *, window: int, prompt_block: int | None = None) -> Truth:
    """The reference beside an engine, or a server, with this configuration."""
    model_config = vllm_config.model_config
    forward, config = load_forward(model_config.model)
    grammars = Grammars(vllm_config, config.mask_token_id)
    return Truth(forward, config, grammars, model_config.max_model_len, window, prompt_block)
