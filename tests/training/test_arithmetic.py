# SPDX-License-Identifier: Apache-2.0
"""The problems: right answers, disjoint splits, nothing to copy."""

import re

import pytest

from training.arithmetic import HIGHEST, LOWEST, SPLITS, final_of, problems, split_of


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_numbers_stay_in_range(split):
    for problem in problems(split, 300, seed=7):
        numbers = [int(n) for n in re.findall(r"\d+", problem.answer)]
        signs = re.findall(r"[+-]", problem.answer)
        assert len(signs) == len(problem.steps)
        total = numbers[0]
        for i, sign in enumerate(signs):
            operand, result = numbers[1 + 2 * i], numbers[2 + 2 * i]
            total = total + operand if sign == "+" else total - operand
            assert total == result
        assert total == problem.final == final_of(problem.answer)
        assert all(LOWEST <= n <= HIGHEST for n in numbers)


def test_question_states_the_numbers_of_the_answer_in_order():
    for problem in problems("train", 200, seed=3):
        stated = [int(n) for n in re.findall(r"\d+", problem.question)]
        assert stated == [problem.start, *map(abs, problem.steps)]


def test_no_number_is_repeated_in_an_answer():
    for problem in problems("train", 500, seed=1):
        numbers = re.findall(r"\d+", problem.answer)
        assert len(numbers) == len(set(numbers))


def test_splits_share_no_numbers_even_with_the_same_seed():
    drawn = {split: {(p.start, p.steps) for p in problems(split, 500, seed=0)} for split in SPLITS}
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & drawn["test"]
    for split, members in drawn.items():
        assert all(split_of(*member) == split for member in members)


def test_same_seed_same_problems_and_all_step_counts():
    first = problems("test", 50, seed=5)
    assert first == problems("test", 50, seed=5)
    assert first != problems("test", 50, seed=6)
    assert {len(p.steps) for p in first} == {2, 3, 4, 5, 6}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="use one of train, validation, test"):
        problems("dev", 1, seed=0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("11+12=23", 23),
        ("", None),
        ("34+", None),
        ("x", None),
        ("11+2=1,200", 1200),
        ("#### -3", -3),
        ("59-18", 18),
        ("It costs 0.5.", 0.5),
    ],
)
def test_final_of(text, value):
    assert final_of(text) == value
