# SPDX-License-Identifier: Apache-2.0
"""Requests with rules of their own, in the engine and in the reference loop."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.parity import load_forward
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.reference import Frame, decode
from vllm_d2f.sampling.request_sampler import make_request_sampler
from vllm_d2f.sampling.sample import Sampling

PARAMS = D2FParams(8, 4, 0.1, 0.95, 0.6)


@dataclass(frozen=True)
class Rule:
    """One request: its prompt, what it asks, and the token ids of its bad words."""

    prompt: tuple[int, ...]
    options: dict[str, Any]
    bad_words: tuple[tuple[int, ...], ...] = ()
    params: D2FParams = PARAMS
    max_tokens: int = 32

    def sampling_params(self) -> Any:
        """Return what a user would send, without bad words: the model has no tokenizer for them."""
        from vllm import SamplingParams

        out = SamplingParams(
            **{"temperature": 0.0, "detokenize": False} | self.options,
            max_tokens=self.max_tokens,
            extra_args={f"d2f_{name}": value for name, value in asdict(self.params).items()},
        )
        out._bad_words_token_ids = [list(word) for word in self.bad_words] or None
        return out


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    forwards: int
    logprobs: tuple[float, ...]


def engine_outputs(llm: Any, rules: list[Rule]) -> list[Any]:
    prompts = [{"prompt_token_ids": list(rule.prompt)} for rule in rules]
    return llm.generate(prompts, [rule.sampling_params() for rule in rules], use_tqdm=False)


def engine_answers(llm: Any, rules: list[Rule]) -> list[Answer]:
    answers = []
    for output in engine_outputs(llm, rules):
        completion = output.outputs[0]
        logprobs = tuple(
            entry[token].logprob
            for token, entry in zip(completion.token_ids, completion.logprobs or (), strict=False)
        )
        answers.append(
            Answer(tuple(completion.token_ids), denoising_forwards(completion), logprobs)
        )
    return answers


def reference_frames(
    loaded: tuple[Any, Any],
    prompt: Sequence[int],
    params: D2FParams,
    request: Any,
    *,
    max_len: int,
    window: int,
    grammar: Any = None,
    prompt_block: int | None = None,
    widths: Sequence[int] | None = None,
) -> Iterator[Frame]:
    """Return the reference's frames of one request.

    Args:
        loaded: what `load_forward` gave.
        request: its `SamplingParams`, n = 1, with a seed if it draws.
        window: positions of the served window.
        grammar: the constraint of a structured output, at its start.
        prompt_block: positions per prompt block of a model with a block-causal prompt.
        widths: what each forward computes, from the trace of an adaptive window.
    """
    forward, config = loaded
    ends = list(request.stop_token_ids or ())
    ends += [] if request.ignore_eos else list(config.end_token_ids)
    request.all_stop_token_ids.update(ends)
    sampling = Sampling.greedy(1)
    sampling.temperature_R[0] = request.temperature
    sampling.top_k_R[0] = max(request.top_k, 0)
    sampling.top_p_R[0] = request.top_p
    sampling.min_p_R[0] = request.min_p
    sampling.seed_R[0] = request.seed or 0
    request_sampler = make_request_sampler(
        request,
        prompt=prompt,
        sampling=sampling,
        ends=ends,
        d2f=params,
        mask_id=config.mask_token_id,
        vocab_size=config.vocab_size,
        window=window,
        grammar=grammar,
    )
    return decode(
        forward,
        prompt,
        params,
        max_tokens=request.max_tokens,
        mask_id=config.mask_token_id,
        ends=ends,
        shift=config.logits_shift,
        max_len=max_len,
        sampling=sampling,
        prompt_block=prompt_block,
        block_origin=config.family.block_origin,
        request_sampler=request_sampler,
        widths=widths,
    )


def reference_frame(
    loaded: tuple[Any, Any], rule: Rule, max_len: int, grammar: Any = None
) -> Frame:
    """Return the reference's last frame."""
    window = rule.params.window
    *_, frame = reference_frames(
        loaded,
        rule.prompt,
        rule.params,
        rule.sampling_params(),
        max_len=max_len,
        window=window,
        grammar=grammar,
    )
    return frame


def reference_answers(model: str, rules: list[Rule], max_len: int) -> list[Answer]:
    loaded = load_forward(model)
    frames = [reference_frame(loaded, rule, max_len) for rule in rules]
    return [
        Answer(
            tuple(frame.tokens),
            frame.forward,
            tuple(frame.logprobs) if rule.options.get("logprobs") is not None else (),
        )
        for rule, frame in zip(rules, frames, strict=True)
    ]
