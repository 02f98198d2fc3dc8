# SPDX-License-Identifier: Apache-2.0
"""MATH as lm-eval's `minerva_math` asks and grades it, over all subjects at once.

lm-eval's own functions, found when they are called: they need `pip install lm-eval[math]`.
"""

from typing import Any


def _minerva() -> Any:
    try:
        from lm_eval.tasks.minerva_math import utils
    except (ModuleNotFoundError, AssertionError) as error:
        raise ModuleNotFoundError(
            "MATH is graded with SymPy: pip install 'lm-eval[math]'"
        ) from error
    return utils


def doc_to_text(doc: dict) -> str:
    return f"Problem:\n{doc['problem']}\n\nSolution:"


def process_docs(dataset: Any) -> Any:
    return _minerva().process_docs(dataset)


def process_results(doc: dict, results: list[str]) -> dict[str, int]:
    return _minerva().process_results(doc, results)


def list_fewshot_samples() -> list[dict]:
    return _minerva().list_fewshot_samples()
