# SPDX-License-Identifier: Apache-2.0
"""Losses and noise against a second, plain computation."""

import math

import pytest
import torch

from training import loss, noise


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_cross_entropy_is_the_weighted_mean_of_negative_log_probabilities(generator):
    logits = torch.randn(5, 7, generator=generator)
    targets = [3, 0, 6, 2, 2]
    weights = [1.0, 0.2, 1.0, 0.2, 1.0]
    total = 0.0
    for row, target, weight in zip(logits.tolist(), targets, weights, strict=True):
        total -= weight * (row[target] - math.log(sum(math.exp(x) for x in row)))
    got = loss.masked_cross_entropy(logits, torch.tensor(targets), torch.tensor(weights))
    assert got.item() == pytest.approx(total / sum(weights), rel=1e-5)


def test_distillation_is_the_kl_from_teacher_to_student(generator):
    student, teacher = torch.randn(2, 4, 6, generator=generator)
    weights = [1.0, 1.0, 0.2, 0.2]
    total = 0.0
    for s_row, t_row, weight in zip(student.tolist(), teacher.tolist(), weights, strict=True):
        s_sum, t_sum = (sum(math.exp(x) for x in row) for row in (s_row, t_row))
        for s, t in zip(s_row, t_row, strict=True):
            p = math.exp(t) / t_sum
            total += weight * p * (math.log(p) - math.log(math.exp(s) / s_sum))
    got = loss.distillation(student, teacher, torch.tensor(weights))
    assert got.item() == pytest.approx(total / sum(weights), rel=1e-5)
    same = loss.distillation(teacher, teacher, torch.tensor(weights))
    assert same.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("schedule", noise.SCHEDULES)
def test_student_ratios_never_fall_and_often_end_fully_masked(schedule, generator):
    ratios = noise.student_ratios(2000, 4, schedule, generator)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    assert (ratios.diff(dim=1) >= 0).all()
    assert 0.3 < (ratios[:, -1] == 1).float().mean() < 0.5


def test_unknown_schedule_is_refused(generator):
    with pytest.raises(ValueError, match="use one of"):
        noise.student_ratios(1, 1, "flat", generator)


def test_teacher_ratios_are_ratios_and_high(generator):
    ratios = noise.teacher_ratios(2000, 32, 27, generator)
    assert ratios.shape == (2000, 32)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    assert ratios[:, -1].mean() > 0.75


def test_masks_follow_the_ratios_and_are_never_empty(generator):
    ratios = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    mask = noise.draw_mask(ratios, generator)
    assert mask[0].sum() == 1
    assert mask[1].all()
    assert mask[2].tolist() == [False, True]
    many = noise.draw_mask(torch.full((1, 20000), 0.3), generator)
    assert many.float().mean().item() == pytest.approx(0.3, abs=0.02)
