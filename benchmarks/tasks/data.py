# SPDX-License-Identifier: Apache-2.0
"""Where the tasks' questions come from: a local folder, or the Hub.

lm-eval calls `load` with a task's `dataset_kwargs` and with its metadata, in which
`benchmarks.evaluate --data FOLDER` (or `lm_eval --metadata '{"data": "FOLDER"}'`) names the folder.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# name -> (Hub id, its configurations, {split: file names that are looked for})
SOURCES: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "gsm8k": (
        "openai/gsm8k",
        ("main",),
        {"test": ("gsm8k_test.jsonl", "test.jsonl"), "train": ("gsm8k_train.jsonl", "train.jsonl")},
    ),
    "math": (
        "EleutherAI/hendrycks_math",
        tuple(
            [
                "algebra",
                "counting_and_probability",
                "geometry",
                "intermediate_algebra",
                "number_theory",
                "prealgebra",
                "precalculus",
            ]
        ),
        {"test": ("math_test.jsonl", "test.jsonl", "test/*/*.json")},
    ),
    "humaneval": ("openai/openai_humaneval", ("openai_humaneval",),
                  {"test": ("HumanEval.jsonl.gz", "HumanEval.jsonl")}),
    "mbpp": ("google-research-datasets/mbpp", ("full",),
             {"test": ("mbpp_test.jsonl", "mbpp.jsonl")}),
}  # fmt: skip
MBPP_TEST = range(11, 511)
"""The task ids of MBPP's test split, for the file that holds all of them."""


class DataMissing(Exception):
    """A folder or file is missing. The message names it and what to pass instead."""


def load(name: str, data: str | None = None, splits: Sequence[str] = ("test",), **_: Any) -> dict:
    """Return the splits of a task as data sets."""
    from datasets import Dataset

    if name == "arithmetic":  # the embedded models' own domain, generated
        from training.arithmetic import problems

        asked = problems("test", 500, seed=0)
        return {"test": Dataset.from_list([{"question": p.question, "answer": p.answer}
                                           for p in asked])}  # fmt: skip
    if data is None:
        return _from_hub(name, splits)
    return {split: Dataset.from_list(read(name, Path(data), split)) for split in splits}


def read(name: str, folder: Path, split: str) -> list[dict[str, Any]]:
    """Return one split's questions from a local folder."""
    files = SOURCES[name][2][split]
    if not folder.is_dir():
        raise DataMissing(f"--data {folder}: no such folder; pass one with {' or '.join(files)}")
    for pattern in files:
        found = sorted(folder.glob(pattern))
        rows = [row for path in found for row in _rows(path)]
        if pattern == "mbpp.jsonl":
            rows = [row for row in rows if row["task_id"] in MBPP_TEST]
        if rows:
            return rows
    raise DataMissing(f"--data {folder}: {split} needs one of these files: {', '.join(files)}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    packed = path.read_bytes()
    text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8")
    if path.suffix == ".json":
        yield json.loads(text)
        return
    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)


def _from_hub(name: str, splits: Sequence[str]) -> dict:
    from datasets import concatenate_datasets, load_dataset

    source, configurations, _ = SOURCES[name]
    try:
        parts = {s: [load_dataset(source, one, split=s) for one in configurations] for s in splits}
        return {split: concatenate_datasets(found) for split, found in parts.items()}
    except Exception as error:
        files = ", ".join(SOURCES[name][2]["test"])
        raise DataMissing(
            f"{source} could not be loaded from the Hub ({type(error).__name__}); pass "
            f"--data FOLDER with one of these files: {files}"
        ) from error
