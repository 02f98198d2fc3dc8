# SPDX-License-Identifier: Apache-2.0
"""The objective against computations written out from the formulas."""

import math
from typing import get_args

import pytest
import torch
from torch import Generator

from training.config import LossSection
from training.data import Example, padded
from training.objectives import (
    block_ratios,
    d2f_loss,
    decoding_ratios,
    diffusion_loss,
    divergence,
    draw_mask,
    in_loss,
    next_token_loss,
    position_ratios,
    summed,
)

MASK, END, VOCAB = 11, 10, 12
SCHEDULES = get_args(LossSection.model_fields["schedule"].annotation)


def generator(seed=0):
    return Generator().manual_seed(seed)


def batch(lengths=(12, 15)):
    examples = [
        Example((1, 2, 3), (4, 5, 6, 7, 8), "a"),
        Example((3, 2, 1, 9), (6, 6, 1, 2, 3, 9), "b"),
    ]
    return padded(examples, lengths, END)


class Bag(torch.nn.Module):
    """A small float64 'model': every position averages what it may see, then one linear layer.

    Its outputs depend on every allowed position and on no other, which is all that the loss needs.
    """

    def __init__(self, seed):
        super().__init__()
        draws = torch.randn(2, VOCAB, 8, generator=generator(seed), dtype=torch.float64)
        self.embed = torch.nn.Parameter(draws[0])
        self.head = torch.nn.Parameter(draws[1].T.contiguous())
        self.seen = []

    def forward(self, ids_BT, position_BT, allowed_BTT, chosen_BT):
        self.seen.append((ids_BT, allowed_BTT, chosen_BT))
        x = self.embed[ids_BT] * (1 + 0.1 * position_BT[..., None].double())
        mixed = allowed_BTT.double() @ x / allowed_BTT.sum(-1, keepdim=True)
        return (torch.cat((torch.zeros_like(mixed[:, :1]), mixed[:, :-1]), 1) @ self.head)[
            chosen_BT
        ]


def by_hand(student, teacher, data, mask, ratios, options):
    """Compute the loss by position in Python floats, with gradients by autograd on scalars."""
    total, weight_sum, count = 0.0, 0.0, 0
    for b in range(len(data.ids_BT)):
        prompt, end = int(data.prompt_BT[b, 0]), int(data.end_BT[b, 0])
        length = int((data.document_BT[b] >= 0).sum())
        ids = [MASK if mask[b, t] else int(data.ids_BT[b, t]) for t in range(length)]

        def block(t, prompt=prompt):
            if t < prompt and options.prompt_attention == "block_causal":
                return t // options.block_size - prompt
            return -1 if t < prompt else (t - prompt) // options.block_size

        def log_probs(net, t, visible, ids=ids):
            mixed = sum(net.embed[ids[k]] * (1 + 0.1 * k) for k in visible) / len(visible)
            logits = mixed @ net.head / options.temperature
            return logits - torch.log(torch.exp(logits).sum())

        for t in range(length):
            if not mask[b, t]:
                continue
            everything = list(range(length))
            # Position t is predicted at t - 1, which sees its own block and those before.
            visible = [k for k in everything if block(k) <= block(t - 1)]
            s = log_probs(student, t, visible)
            q = log_probs(teacher, t, everything).detach()
            forward = sum(math.exp(q[v]) * (q[v] - s[v]) for v in range(VOCAB))
            reverse = sum(torch.exp(s[v]) * (s[v] - q[v]) for v in range(VOCAB))
            kl = {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}
            w = options.tail_weight if t > end else 1.0
            if options.weight == "inverse_ratio":
                w = w / float(ratios[b, t])
            total = total + w * kl[options.kl] * options.temperature**2
            weight_sum, count = weight_sum + w, count + 1
    return total / (weight_sum if options.normalise == "weights" else count)


@pytest.mark.parametrize(
    "options",
    [
        LossSection(block_size=4),
        LossSection(block_size=4, kl="reverse", normalise="tokens", temperature=2.0),
        LossSection(block_size=3, kl="mixed", schedule="monotone", full_tail=0, tail_weight=1.0),
        LossSection(block_size=4, schedule="random", end_padding="block"),
        LossSection(block_size=2, weight="inverse_ratio", prompt_attention="block_causal"),
        # As the authors' code: 1 / ratio, and the mean over the number of masked positions.
        LossSection(
            block_size=4,
            schedule="monotone",
            full_tail=0,
            weight="inverse_ratio",
            normalise="tokens",
            tail_weight=1.0,
        ),
    ],
    ids=["default", "reverse", "mixed", "random", "causal prompt", "authors"],
)
def test_loss_and_gradients_equal_the_formula(options):
    data, student, teacher = batch(), Bag(1), Bag(2)
    loss = d2f_loss(student, teacher, data, options, MASK, generator(5)).total
    loss.backward()
    got = [p.grad.clone() for p in student.parameters()]
    assert all(p.grad is None for p in teacher.parameters())
    mask = student.seen[0][2]
    assert mask.any() and loss.dtype == torch.float64
    student.zero_grad()
    ratios = position_ratios(data, options, generator(5))  # what the loss has drawn first
    expected = by_hand(student, teacher, data, mask, ratios, options)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(got, student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_batch_without_weight_costs_nothing():
    """`tail_weight` 0, and nothing masked but what stands behind the end token."""
    data, options = batch(), LossSection(block_size=4, tail_weight=0.0)
    loss = summed(torch.ones(2), data, data.tail_BT & (data.position_BT == 11), None, options)
    assert float(loss.total) == 0 and float(loss.tail) == 1


def test_inverse_ratio_weights():
    data, student, teacher = batch(), Bag(1), Bag(2)
    plain = LossSection(block_size=4, normalise="tokens", tail_weight=1.0)
    weighted = plain.model_copy(update={"weight": "inverse_ratio"})
    ratios = position_ratios(data, plain, generator(5))
    got = d2f_loss(student, teacher, data, weighted, MASK, generator(5)).total
    mask = student.seen[0][2]
    ids = data.ids_BT.masked_fill(mask, MASK)
    s = student(ids, data.position_BT, student.seen[0][1], mask)
    t = teacher(ids, data.position_BT, teacher.seen[0][1], mask)
    expected = (divergence(s, t, plain) / ratios[mask]).sum() / mask.sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)


def test_prompts_and_padding_are_never_masked():
    data = batch((12, 16))
    for seed in range(50):
        ratios = position_ratios(data, LossSection(block_size=4), generator(seed))
        mask = draw_mask(ratios, data, generator(seed))
        assert mask.any(1).all()
        assert not (mask & ~data.answer_BT).any()


def test_teacher_sees_everything_and_student_no_later_block():
    data, student, teacher = batch(), Bag(1), Bag(2)
    d2f_loss(student, teacher, data, LossSection(block_size=4), MASK, generator())
    (ids, seen, _), (teacher_ids, everything, _) = student.seen[0], teacher.seen[0]
    assert torch.equal(ids, teacher_ids)
    real = data.document_BT >= 0
    pairs = real[:, :, None] & real[:, None]
    assert everything[pairs].all()
    block = torch.where(data.answer_BT, data.block_BT(4), -1)
    assert torch.equal(seen[pairs], (block[:, None] <= block[:, :, None])[pairs])


def test_end_padding_choices():
    data = batch((15, 16))  # answers of 5 and 6 with the end token behind them, blocks of 4
    count = {
        choice: in_loss(data, LossSection(block_size=4, end_padding=choice)).sum(1).tolist()
        for choice in ("all", "block", "none")
    }
    assert count == {"all": [12, 12], "block": [8, 8], "none": [6, 7]}


@pytest.mark.parametrize("teacher_input", ["student", "fresh"])
def test_other_teacher_inputs(teacher_input):
    data, student, teacher = batch(), Bag(1), Bag(2)
    student.head.data *= 4  # sure enough to accept some of its own tokens
    options = LossSection(
        block_size=4, teacher_input=teacher_input, full_tail=0, schedule="monotone"
    )
    loss = d2f_loss(student, teacher, data, options, MASK, generator(3))
    loss.total.backward()
    assert loss.total.isfinite() and student.head.grad.abs().sum() > 0
    teacher_ids, _, chosen = teacher.seen[-1]
    student_ids = student.seen[-1][0]
    # What is compared is masked for both.
    assert (teacher_ids[chosen] == MASK).all() and (student_ids[chosen] == MASK).all()
    if teacher_input == "student":
        assert torch.equal(teacher_ids, student_ids)
        first_ids, first_mask = student.seen[0][0], student.seen[0][2]
        filled = first_mask & ~chosen
        assert filled.any() and chosen.any(1).all()
        assert torch.equal(teacher_ids[~first_mask], first_ids[~first_mask])
    else:
        assert not torch.equal(teacher_ids, student_ids)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_ratios_with_their_bounds(schedule):
    options = LossSection(schedule=schedule, full_tail=0)
    ratios = block_ratios(options, 4000, 6, generator())
    low, high = {"monotone": (0.2, 0.7), "paper": (0.3, 0.7)}.get(schedule, (0.0, 1.0))
    assert ratios.min() >= low and ratios.max() <= high + 1e-6
    rises = (ratios.diff(dim=1) >= 0).all()
    assert rises == (schedule != "random")
    # Means by the definitions: first blocks, and last ones.
    first, last = ratios[:, 0].mean().item(), ratios[:, -1].mean().item()
    expected = {
        "monotone": (0.45, 0.575),
        "paper": (0.3 + 0.4 / 7, 0.3 + 0.4 * 6 / 7),
        "chain_uniform": (0.5, 1 - 0.5**6),
        "sorted_uniform": (1 / 7, 6 / 7),
        "random": (0.5, 0.5),
    }[schedule]
    assert (first, last) == pytest.approx(expected, abs=0.02)


def test_full_tail_masks_blocks_behind_a_random_one():
    options = LossSection(schedule="monotone", full_tail=1.0)
    ratios = block_ratios(options, 3000, 4, generator())
    assert (ratios[:, 0] < 1).all()
    # The first open block is uniform over the four, so the last is full in three quarters.
    assert (ratios[:, -1] == 1).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_next_token_loss_is_cross_entropy_of_answer_and_end():
    data, model = batch(), Bag(1)
    loss = next_token_loss(model, data, LossSection())
    total, count = 0.0, 0
    for b, (prompt, end) in enumerate(((3, 8), (4, 10))):
        for t in range(prompt, end + 1):
            ids = data.ids_BT[b].tolist()
            mixed = sum(model.embed[ids[k]] * (1 + 0.1 * k) for k in range(t)) / t
            logits = mixed @ model.head
            total += (torch.log(torch.exp(logits).sum()) - logits[ids[t]]).item()
            count += 1
    assert loss.total.item() == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("pattern", ["uniform", "decoding"])
def test_diffusion_loss_compares_masked_positions_with_the_data(pattern):
    data, model = batch(), Bag(1)
    options = LossSection(pattern=pattern, tail_weight=0.5)
    loss = diffusion_loss(model, data, options, MASK, generator(1))
    ids, seen, mask = model.seen[0]
    assert (ids[mask] == MASK).all() and torch.equal(ids[~mask], data.ids_BT[~mask])
    logits = model(ids, data.position_BT, seen, mask)
    nll = torch.nn.functional.cross_entropy(logits, data.ids_BT[mask], reduction="none")
    weights = torch.where(data.tail_BT[mask], 0.5, 1.0)
    assert loss.total.item() == pytest.approx(
        ((nll * weights).sum() / weights.sum()).item(), rel=1e-5
    )


def test_decoding_ratios_are_high_and_tails_may_differ():
    examples = [Example((1, 2), tuple(range(1, 9)), "")] * 3000
    data = padded(examples, [2 + 32] * 3000, END)
    ratios = decoding_ratios(data, 0.3, generator())
    assert ((ratios >= 0) & (ratios <= 1)).all()
    answer, tail = ratios[:, 2:10].mean(1), ratios[:, 12:].mean(1)
    assert tail.mean() > 0.6
    # Tails filled before the answer, as decoders that take the surest position first do it.
    assert ((answer > 0.5) & (tail < 0.3)).float().mean() > 0.03
    assert ((answer > 0.9) & (tail > 0.9)).float().mean() > 0.02


def test_mask_frequencies_follow_the_ratios():
    data = padded([Example((1,), (2,) * 20, "")] * 4000, [22] * 4000, END)
    ratios = torch.where(data.answer_BT, 0.3, 0.0)
    mask = draw_mask(ratios, data, generator())
    assert mask.any(1).all()
    assert mask[:, 1:].float().mean().item() == pytest.approx(0.3, abs=0.01)
