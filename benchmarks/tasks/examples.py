# SPDX-License-Identifier: Apache-2.0
"""The worked examples of GSM8K and MBPP, as lm-eval and the paper give them."""

from pathlib import Path

SIMILAR = """def similar_elements(test_tup1, test_tup2):
  res = tuple(set(test_tup1) & set(test_tup2))
  return (res) """
PRIME = """import math
def is_not_prime(n):
    result = False
    for i in range(2,int(math.sqrt(n)) + 1):
        if n % i == 0:
            result = True
    return result"""
LARGEST = """import heapq as hq
def heap_queue_largest(nums,n):
  largest_nums = hq.nlargest(n, nums)
  return largest_nums"""
NUMBERS = "[25, 35, 22, 85, 14, 65, 75, 22, 58]"


def gsm8k() -> list[dict]:
    """Return the eight questions of lm-eval's `gsm8k_cot`, read from lm-eval's file."""
    import lm_eval
    import yaml

    file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))["fewshot_config"]["samples"]


def mbpp() -> list[dict]:
    """Return problems 2 to 4. lm-eval's own list cannot be imported without a network."""
    rows = (
        ("find the similar elements from the given two tuple lists", SIMILAR,
         "similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
         "similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
         "similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)"),
        ("identify non-prime numbers", PRIME, "is_not_prime(2) == False",
         "is_not_prime(10) == True", "is_not_prime(35) == True"),
        ("find the largest integers from a given list of numbers using heap queue algorithm",
         LARGEST, f"heap_queue_largest( {NUMBERS},3)==[85, 75, 65] ",
         f"heap_queue_largest( {NUMBERS},2)==[85, 75] ",
         f"heap_queue_largest( {NUMBERS},5)==[85, 75, 65, 58, 35]"),
    )  # fmt: skip
    return [
        {
            "task_id": number,
            "text": f"Write a {'python ' * (number == 3)}function to {text}.",
            "code": code.replace("\n", "\r\n"),
            "test_list": [f"assert {test}" for test in tests],
            "is_fewshot": True,
        }
        for number, (text, code, *tests) in enumerate(rows, 2)
    ]
