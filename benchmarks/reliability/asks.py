# SPDX-License-Identifier: Apache-2.0
"""Requests of many kinds for an engine in this process, and what the reference answers them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.parity import Answer, Case, sampling_params
from benchmarks.reliability.truth import Known, load_truth
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards

SETTINGS = [
    D2FParams(block_size, max_blocks, *taus)
    for block_size, max_blocks in ((4, 8), (8, 4), (8, 8), (16, 1), (16, 4), (32, 2), (32, 4))
    for taus in ((0.1, 0.95, 0.9), (0.7, 0.95, 0.6), (0.9, 0.5, 0.99))
]
"""Block sizes, window widths and thresholds (tau_add, tau_act, tau_conf)."""

WINDOW = max(params.window for params in SETTINGS)

RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "traced": {"d2f_trace": 1},
    "drawn": {"temperature": 0.9, "top_p": 0.95},
    "penalty": {"repetition_penalty": 1.2, "presence_penalty": 0.3},
    "logprobs": {"logprobs": 3},
    "endless": {"ignore_eos": True},
    "regex": {"structured_outputs": {"regex": r"(pens|apples): [0-9]{1,4}"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no", "Leo has 9 pens"]}},
    "schema": {
        "structured_outputs": {
            "json": {
                "type": "object",
                "properties": {"left": {"type": "integer", "minimum": 0, "maximum": 9999}},
                "required": ["left"],
                "additionalProperties": False,
            }
        }
    },
}
"""Kinds of requests."""

PLAIN = ("greedy", "traced", "endless")
"""Those without rules of their own."""


@dataclass(frozen=True)
class Ask:
    """One request: a case and its kind, a key of `RULES`."""

    case: Case
    kind: str = "greedy"
    seed: int = 0

    def sampling_params(self) -> Any:
        """As a user would send it."""
        from vllm.sampling_params import StructuredOutputsParams

        params = sampling_params(self.case)
        for name, value in RULES[self.kind].items():
            if name == "structured_outputs":
                params.structured_outputs = StructuredOutputsParams(**value)
            elif name == "d2f_trace":
                params.extra_args[name] = value
            else:
                setattr(params, name, value)
        if params.temperature:
            params.seed = self.seed
        return params


def make_asks(count: int, seed: int, max_len: int, *, ruled: float) -> list[Ask]:
    """Distinct requests.

    Args:
        max_len: the model's longest sequence.
        ruled: the share of requests with rules of their own.
    """
    from transformers import AutoTokenizer

    from training.arithmetic import problems
    from vllm_d2f.hub.names import resolve

    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(resolve("d2f-tiny"))
    questions = [tokenizer(p.question).input_ids for p in problems("test", count, seed)]
    others = [kind for kind in RULES if kind not in PLAIN]
    asks = []
    for question in questions:
        kind = rng.choice(others if rng.random() < ruled else PLAIN)
        prompt, max_tokens = question, rng.choice((1, 7, 16, 40, 90, 160))
        if rng.random() < 0.6:
            # A question is answered in few forwards. Random tokens are not, but many end at once.
            length = rng.choice((3, 20, 60, 130))
            prompt = [rng.randrange(2, 448) for _ in range(rng.randint(1, length))]
            if kind in PLAIN and rng.random() < 0.8:
                kind = "endless"
        params = rng.choice(SETTINGS)
        if kind in ("regex", "choice", "schema"):
            max_tokens = 40
        assert len(prompt) + max_tokens <= max_len
        asks.append(Ask(Case(tuple(prompt), params, max_tokens), kind, rng.randrange(1 << 31)))
    return asks


def known_answers(
    asks: Sequence[Ask], vllm_config: Any, prompt_block: int | None = None
) -> list[Known]:
    """By the reference, on the model of an engine's configuration."""
    from tqdm import tqdm

    truth = load_truth(vllm_config, window=WINDOW, prompt_block=prompt_block)
    return [
        truth.answer(ask.case.prompt, ask.case.params, ask.sampling_params())
        for ask in tqdm(asks, desc="reference", disable=None)
    ]


def answer_of(output: Any) -> Answer:
    """Tokens and forwards of a finished output."""
    completion = output.outputs[0]
    return Answer(tuple(completion.token_ids), denoising_forwards(completion))
