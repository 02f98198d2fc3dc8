# SPDX-License-Identifier: Apache-2.0
"""The questions of the benchmarks, and how answers are graded.

If the command line names something that is missing or of another kind, a UsageError says so.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.record import UsageError
from vllm_d2f.demo import final_number

HINT = 'pass a JSONL file with "question" and "answer" per line, such as GSM8K\'s test.jsonl'


@dataclass(frozen=True, slots=True)
class Item:
    """A question, the number its answer ends with, and the whole answer where one is expected.

    `schema` is a JSON schema that the request asks for.
    """

    question: str
    final: float
    answer: str | None = None
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    final: bool  # ended by itself with the right number
    exact: bool  # is the expected text


def grade(item: Item, text: str, ended: bool) -> Grade:
    """Grade an answer. One that was cut off is wrong, whatever its last number is."""
    return Grade(
        final=ended and final_number(text) == item.final,
        exact=ended and item.answer is not None and text == item.answer,
    )


def load_items(count: int, data: str | None, seed: int) -> list[Item]:
    """Return `count` generated problems of the test split, or the first ones of a JSONL file."""
    if data is None:
        try:
            from training.arithmetic import problems
        except ModuleNotFoundError:
            raise UsageError(
                "the problem generator is not here (run from the repository's root), and no "
                '--data was given: pass --data FILE, JSONL with "question" and "answer" per line'
            ) from None
        return [Item(p.question, p.final, p.answer) for p in problems("test", count, seed)]
    items = []
    for number, row in enumerate(_rows(data, count), 1):
        try:
            final = final_number(row["answer"])
            items.append(Item(row["question"], float("nan") if final is None else final))
        except (KeyError, TypeError) as error:
            raise UsageError(f"--data {data}, line {number}: {error!r}; {HINT}") from None
    if len(items) < count:
        raise UsageError(
            f"--data {data}: {len(items)} questions, {count} are needed; pass a longer file, or "
            "smaller --batch-sizes and --prompts"
        )
    return items


def _rows(data: str, count: int) -> Iterator[Any]:
    """Yield at most `count` lines of a JSONL file."""
    try:
        lines = Path(data).read_text(encoding="utf-8").splitlines()[:count]
    except (OSError, ValueError) as error:
        raise UsageError(f"--data {data}: {error!r}; {HINT}, or leave it out") from None
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UsageError(f"--data {data}, line {number}: {error!r}; {HINT}") from None


def load_prompts(model: str, count: int, data: str | None, seed: int) -> list[list[int]]:
    """Return token ids of questions from a file or generated ones; random without a tokenizer."""
    if data is None and not (Path(model) / "tokenizer.json").exists():
        from transformers import AutoConfig

        rng = random.Random(seed)
        top = AutoConfig.from_pretrained(model).vocab_size
        return [[rng.randrange(top) for _ in range(rng.randint(1, 60))] for _ in range(count)]

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if data is None:
        return [tokenizer(item.question).input_ids for item in load_items(count, None, seed)]
    try:
        return [tokenizer(row["question"]).input_ids for row in _rows(data, count)]
    except (KeyError, TypeError) as error:
        raise UsageError(f"--data {data}: {error!r}; {HINT}") from None


def parse_options(option: str, text: str) -> dict[str, Any]:
    """Return the engine arguments in a JSON object."""
    try:
        if isinstance(options := json.loads(text), dict):
            return options
        problem = f"a JSON object is needed, this is {type(options).__name__}"
    except ValueError as error:
        problem = str(error)
    example = """pass an object such as '{"gpu_memory_utilization": 0.4}' """.strip()
    raise UsageError(f"{option} {text}: {problem}; {example}")


def resolve_model(option: str, name: str) -> str:
    """Return the folder or Hub id of a model; a folder that is not there is an error."""
    from vllm_d2f.hub.names import UnknownModelError, resolve

    names = "an embedded name (d2f-tiny, ar-tiny, dream-tiny)"
    hint = f"pass {option} {names} or a checkpoint's folder"
    try:
        path = resolve(name)
    except UnknownModelError as error:
        raise UsageError(f"{option} {name}: {error}; {hint}") from None
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not (Path(path) / "config.json").is_file():
        raise UsageError(f"{option} {name}: no config.json there; {hint}, or a Hub id (owner/name)")
    return path


def d2f_model(option: str, name: str) -> tuple[str, Any, Any]:
    """Return the folder of a D2F model, its config, and its own settings."""
    from transformers import AutoConfig

    from vllm_d2f import register
    from vllm_d2f.models import family_config
    from vllm_d2f.settings import settings_from_dict

    register()
    folder = resolve_model(option, name)
    config = family_config(AutoConfig.from_pretrained(folder))
    if not hasattr(config, "d2f"):
        raise UsageError(f"{option} {name} is no D2F model: its config has no d2f section")
    return folder, config, settings_from_dict(config.d2f, family=config.family)


def simulated(hf_config: Any) -> float | None:
    """Return the tokens per forward that a D2F model's config makes up, None if it does not."""
    return (getattr(hf_config, "d2f", None) or {}).get("simulate_tokens_per_forward")


def refuse_simulated(option: str, hf_config: Any, measures: str) -> None:
    """Refuse a model without a score, for benchmarks whose result is one."""
    if simulated(hf_config) is not None:
        raise UsageError(
            f"{option}: its config simulates acceptance (d2f.simulate_tokens_per_forward), and "
            f"{measures} of made-up text means nothing; pass a checkpoint without that setting"
        )
