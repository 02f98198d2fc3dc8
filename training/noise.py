# SPDX-License-Identifier: Apache-2.0
"""Which positions of an answer are masked in training.

Shapes: B sequences, N blocks, A positions behind the prompt.
"""

import torch
from torch import Generator, Tensor

SCHEDULES = ("chain_uniform", "sorted_uniform")


def teacher_ratios(B: int, A: int, answer_len: int, generator: Generator) -> Tensor:
    """Mask ratio of every position, (B, A), for the bidirectional teacher.

    Low ratios only reward copying, so they are biased high: a quarter of the sequences has one
    ratio in [0.3, 1]. The rest looks like a decoding under way, with few masks before a cut
    inside the answer and many behind it; half of these are wholly masked behind the cut.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, 1, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(B, 1, generator=generator) < probability

    cut_B1 = torch.randint(0, answer_len, (B, 1), generator=generator)
    before_B1 = torch.where(chance(0.6), 0.0, uniform(0.0, 0.4))
    behind_B1 = torch.where(chance(0.5), 1.0, uniform(0.4, 1.0))
    rising_BA = torch.where(torch.arange(A) < cut_B1, before_B1, behind_B1)
    return torch.where(chance(0.25), uniform(0.3, 1.0).expand(B, A), rising_BA)


def student_ratios(B: int, N: int, schedule: str, generator: Generator) -> Tensor:
    """Mask ratio of every block, (B, N), never falling from one block to the next.

    `chain_uniform` draws every ratio between the one before it and 1, `sorted_uniform` sorts
    independent draws. Decoding starts from wholly masked blocks, so in half of the sequences the
    blocks behind a random one have ratio 1.
    """
    draws_BN = torch.rand(B, N, generator=generator)
    if schedule == "chain_uniform":
        # 1 - r_i is the product of the draws up to i.
        ratios_BN = 1 - draws_BN.cumprod(1)
    elif schedule == "sorted_uniform":
        ratios_BN = draws_BN.sort(1).values
    else:
        raise ValueError(f"schedule {schedule!r} does not exist; use one of {SCHEDULES}")
    first_B1 = torch.randint(0, N, (B, 1), generator=generator)
    full_B1 = torch.rand(B, 1, generator=generator) < 0.5
    return torch.where(full_B1 & (torch.arange(N) > first_B1), 1.0, ratios_BN)


def draw_mask(ratios_BA: Tensor, generator: Generator) -> Tensor:
    """Mask every position independently with its ratio; at least one in every sequence."""
    draws_BA = torch.rand(ratios_BA.shape, generator=generator)
    mask_BA = draws_BA < ratios_BA
    # Where nothing was masked, mask the position that came nearest to it.
    nearest_B1 = (draws_BA - ratios_BA).argmin(1, keepdim=True)
    return mask_BA.scatter(1, nearest_B1, True)
