# SPDX-License-Identifier: Apache-2.0
"""The objectives of the models that come before a student: autoregressive, and masked diffusion.

Shapes: B rows, T tokens, D documents, M chosen positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from training.attention import allowed
from training.config import LossSection
from training.data import Batch
from training.loss import Logits, Loss, draw_mask, in_loss, rand, summed


def next_token_loss(model: Logits, batch: Batch, options: LossSection) -> Loss:
    """Cross-entropy of the answers and their first end tokens, under causal attention."""
    chosen_BT = batch.answer_BT & ~batch.tail_BT
    logits_MV = model(batch.ids_BT, batch.position_BT, allowed(batch, "causal"), chosen_BT)
    loss_M = F.cross_entropy(logits_MV.float(), batch.ids_BT[chosen_BT], reduction="none")
    return summed(loss_M, batch, chosen_BT, None, options)


def diffusion_loss(
    model: Logits, batch: Batch, options: LossSection, mask_id: int, generator: Generator
) -> Loss:
    """Cross-entropy of the masked positions, under full attention (LLaDA, Dream)."""
    if options.pattern == "decoding":
        ratios_BT = decoding_ratios(batch, options.low, generator)
    else:
        ratios_D = options.low + (1 - options.low) * rand(batch.documents, generator=generator)
        ratios_BT = ratios_D[batch.document_BT.clamp(min=0)]
    ratios_BT = ratios_BT.where(in_loss(batch, options), 0.0)
    masked_BT = draw_mask(ratios_BT, batch, generator)
    noised_BT = batch.ids_BT.masked_fill(masked_BT, mask_id)
    logits_MV = model(noised_BT, batch.position_BT, allowed(batch, "full"), masked_BT)
    loss_M = F.cross_entropy(logits_MV.float(), batch.ids_BT[masked_BT], reduction="none")
    return summed(loss_M, batch, masked_BT, ratios_BT, options)


def decoding_ratios(batch: Batch, low: float, generator: Generator) -> Tensor:
    """Mask ratio of every position, (B, T), as a decoding under way shows them.

    Low ratios only reward copying, so they are biased high. A quarter of the documents has one
    ratio in [low, 1]. The others have few masks before a cut inside the answer and many behind it,
    half of them nothing but masks. Decoders that take the surest position first fill the end
    tokens before anything else, so in a third of the documents the tail has a ratio of its own.
    """
    D = batch.documents

    def uniform(least: float, most: float) -> Tensor:
        return least + (most - least) * rand(D, generator=generator)

    def chance(probability: float) -> Tensor:
        return rand(D, generator=generator) < probability

    cut_D, one_D = rand(D, generator=generator), chance(0.25)
    before_D = torch.where(chance(0.6), 0.0, uniform(0.0, 0.4))
    behind_D = torch.where(chance(0.5), 1.0, uniform(0.4, 1.0))
    alike_D, own_tail_D, tail_D = uniform(low, 1.0), chance(1 / 3), uniform(0.0, 1.0)
    document_BT = batch.document_BT.clamp(min=0)
    answer_BT = (batch.end_BT - batch.prompt_BT + 1).clamp(min=1)
    at_BT = (batch.position_BT - batch.prompt_BT) / answer_BT
    rising_BT = torch.where(
        at_BT < cut_D[document_BT], before_D[document_BT], behind_D[document_BT]
    )
    ratios_BT = torch.where(one_D[document_BT], alike_D[document_BT], rising_BT)
    own_BT = own_tail_D[document_BT] & batch.tail_BT
    return torch.where(own_BT, tail_D[document_BT], ratios_BT)
