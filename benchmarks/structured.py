# SPDX-License-Identifier: Apache-2.0
"""Structured outputs: do 300 answers over 10 schemas parse and validate, and what does it cost?

    python -m benchmarks.structured              # greedy and at temperature 0.8, on d2f-tiny
    python -m benchmarks.structured --rounds 1   # 10 answers each, for tests

A request with a grammar is decoded from left to right, so a forward decodes fewer of its tokens.
The same prompts are also answered without a grammar, with the same limit of tokens.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jsonschema

from benchmarks.harness import record
from benchmarks.harness.engine import shut_down, start_llm
from benchmarks.harness.record import Record

ROUNDS = 30
MAX_TOKENS = 128


def an_object(**properties: Any) -> dict[str, Any]:
    """Return a schema in which all of these are required and nothing else is allowed."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


WORD = {"type": "string", "maxLength": 8}
COUNT = {"type": "integer", "minimum": 0, "maximum": 9999}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": an_object(name=WORD, count=COUNT),
    "enum": an_object(thing={"enum": ["pens", "apples", "shells"]}, left=COUNT),
    "list": {"type": "array", "items": COUNT, "minItems": 1, "maxItems": 5},
    "nested": an_object(owner=an_object(name=WORD), items={"type": "array", "maxItems": 2,
                                                          "items": an_object(n=COUNT)}),
    "boolean and null": an_object(sold={"type": "boolean"}, note={"type": "null"}),
    "string lengths": an_object(code={"type": "string", "minLength": 3, "maxLength": 3}),
    "pattern": an_object(day={"type": "string", "pattern": "^[A-Z][a-z]{2}-[0-9]{2}$"}),
    "one of two": {"anyOf": [an_object(pens=COUNT), an_object(eggs=COUNT)]},
    "const": an_object(kind={"const": "sale"}, price={"type": "integer", "minimum": -50,
                                                     "maximum": 50}),
    "pair": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
}  # fmt: skip
"""Bounded, so that a whole answer fits `MAX_TOKENS`."""


def cases(prompts: Sequence[str], rounds: int = ROUNDS) -> list[tuple[str, str, int]]:
    """Return schema name, prompt and seed: every schema once a round, prompts of many lengths."""
    return [
        (name, f"{'So: ' * (i % 3)}{prompts[i % len(prompts)]}"[: 200 - i], i)
        for i in range(rounds)
        for name in SCHEMAS
    ]


def is_valid(name: str, text: str) -> bool:
    """Return whether an answer is JSON that its schema allows."""
    try:
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


def measure(llm: Any, asked: Sequence[tuple[str, str, int]], temperature: float) -> dict[str, Any]:
    """Return the answers that validate, and tokens per forward with the grammar and without."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from vllm_d2f.metrics import denoising_forwards

    def run(constrained: bool) -> tuple[float, list[str]]:
        params = [
            SamplingParams(
                temperature=temperature,
                seed=seed if temperature else None,
                max_tokens=MAX_TOKENS,
                structured_outputs=StructuredOutputsParams(json=json) if constrained else None,
            )
            for json, seed in ((SCHEMAS[name], seed) for name, _, seed in asked)
        ]
        outputs = llm.generate([prompt for _, prompt, _ in asked], params, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        tokens = sum(len(answer.token_ids) for answer in answers)
        forwards = sum(map(denoising_forwards, answers))
        return round(tokens / forwards, 2), [answer.text for answer in answers]

    with_grammar, texts = run(True)
    without, _ = run(False)
    return {
        "answers": len(texts),
        "valid": sum(is_valid(name, text) for (name, *_), text in zip(asked, texts, strict=True)),
        "tokens_per_forward": with_grammar,
        "tokens_per_forward_without": without,
    }


def markdown(report: Mapping[str, Any]) -> list[str]:
    return [
        *record.head("Structured outputs", report),
        *record.columns(
            "temperature answers valid tokens_per_forward tokens_per_forward_without",
            ({"temperature": heat, **row} for heat, row in report["temperature"].items()),
        ),
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("structured", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="answers per schema")
    return parser.finish(argv, {"rounds": 1}, ("rounds",))


def structured(run: Record) -> int:
    """Measure and report. Return 1 if an answer does not validate."""
    from vllm_d2f.demo import bundled_problems

    backend = {"backend": "xgrammar", "disable_any_whitespace": True}
    options = dict(enforce_eager=True, max_num_seqs=32, structured_outputs_config=backend)
    llm = start_llm("d2f-tiny", **options)
    asked = cases([problem.question for problem in bundled_problems()], run.args.rounds)
    figures = {
        str(heat): run.point(f"temperature {heat}", partial(measure, llm, asked, heat))
        for heat in (0.0, 0.8)
    }
    shut_down(llm)
    run.need_all()
    run.write(run.report(model="d2f-tiny", schemas=len(SCHEMAS), temperature=figures))
    return int(any(row["valid"] != row["answers"] for row in figures.values()))


main = record.command(parse, structured, markdown)

if __name__ == "__main__":
    sys.exit(main())
