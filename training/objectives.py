# SPDX-License-Identifier: Apache-2.0
"""The objectives: from a batch and a model to a loss.

`next_token_loss` is autoregressive, `diffusion_loss` trains a bidirectional model of masked
positions, and `d2f_loss` distils a student that decodes blocks:

1. Every block of an answer gets a mask ratio (`block_ratios`), and its positions are masked
   independently with it (`noised`). Prompts are never masked.
2. The teacher predicts the masked positions seeing the whole noised sequence; the student sees, of
   it, the prompt, its own block and the blocks before (`vllm_d2f.d2f.may_attend`).
3. The loss is the divergence between the two at the masked positions (`divergence`), weighted.

Which choices follow the paper, and which follow the authors' code, is explained in
`training/configs/dream-7b.yaml`.

Shapes: B rows, T tokens, D documents, N blocks of a document, M masked positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from training.attention import allowed
from training.config import LossSection
from training.data import Batch
from training.windows import with_windows

Logits = Callable[..., Tensor]
"""(ids_BT, position_BT, allowed_BTT, chosen_BT[, before_BT]) -> logits_MV that predict the chosen
positions. The shift of Dream is inside: the output at i - 1 predicts position i."""

TINY = 1e-9
"""Prevents a division by 0 for a batch whose positions all have weight 0."""


@dataclass(frozen=True)
class Loss:
    """A weighted sum over positions, with what it is to be divided by.

    What is minimised is the sum over all forwards and processes of an update divided by the
    sum of their `whole`: an update does not depend on how its sequences are spread over them.
    `content` and `tail` are plain means, for the log: behind the end token everything is easy, so a
    mean over both says little.
    """

    summed: Tensor
    whole: Tensor
    content: Tensor
    tail: Tensor

    @property
    def total(self) -> Tensor:
        """The loss of this batch alone."""
        return self.summed / self.whole.clamp(min=TINY)


def rand(*shape: int, generator: Generator) -> Tensor:
    """Draw uniform numbers on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def next_token_loss(model: Logits, batch: Batch, options: LossSection) -> Loss:
    """Return the cross-entropy of answers and their first end tokens, under causal attention."""
    chosen_BT = batch.answer_BT & ~batch.tail_BT
    logits_MV = model(batch.ids_BT, batch.position_BT, allowed(batch, "causal"), chosen_BT)
    loss_M = F.cross_entropy(logits_MV.float(), batch.ids_BT[chosen_BT], reduction="none")
    return summed(loss_M, batch, chosen_BT, None, options)


def diffusion_loss(
    model: Logits, batch: Batch, options: LossSection, mask_id: int, generator: Generator
) -> Loss:
    """Return the cross-entropy of the masked positions, under full attention (LLaDA, Dream)."""
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
    """Draw the mask ratio of every position, (B, T), to look like a partly decoded answer.

    Low ratios only reward copying, so they are biased high. A quarter of the documents has one
    ratio in [low, 1]. The others have few masks before a cut inside the answer and many behind it,
    half of them only masks. Decoders that take the most confident position first fill the end
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


def block_ratios(options: LossSection, D: int, N: int, generator: Generator) -> Tensor:
    """Draw the mask ratio of every block, (D, N).

    `monotone` is the authors' code: the first one from U(0.2, 0.7), and then every next one more by
    a random part of what is left to 0.7. `paper`: ascending draws from U(0.3, 0.7).
    `sorted_uniform`: ascending draws from U(0, 1). `chain_uniform`: every one drawn between the
    one before and 1. `random`: independent draws from U(0, 1).
    """
    draws_DN = rand(D, N, generator=generator)
    if options.schedule == "monotone":
        first_D1 = 0.2 + 0.5 * draws_DN[:, :1]
        rises_DN = draws_DN * (0.7 - first_D1) / max(N - 1, 1)
        rises_DN[:, 0] = 0
        ratios_DN = first_D1 + rises_DN.cumsum(1)
    elif options.schedule == "paper":
        ratios_DN = 0.3 + 0.4 * draws_DN.sort(1).values
    elif options.schedule == "sorted_uniform":
        ratios_DN = draws_DN.sort(1).values
    elif options.schedule == "chain_uniform":
        # 1 - r_i is the product of the draws up to i.
        ratios_DN = 1 - draws_DN.cumprod(1)
    else:
        ratios_DN = draws_DN
    first_D1 = (rand(D, 1, generator=generator) * N).floor()
    full_D1 = rand(D, 1, generator=generator) < options.full_tail
    behind_DN = torch.arange(N, device=generator.device) > first_D1
    return torch.where(full_D1 & behind_DN, 1.0, ratios_DN)


def in_loss(batch: Batch, options: LossSection) -> Tensor:
    """Return which positions may be masked, bool (B, T): answers, and some end tokens behind.

    `end_padding` says which of these.
    """
    if options.end_padding == "all":
        return batch.answer_BT
    if options.end_padding == "none":
        return batch.answer_BT & ~batch.tail_BT
    size, origin = options.block_size, options.block_origin
    last_BT = (batch.end_BT - batch.begin_BT(size, origin)).div(size, rounding_mode="floor")
    return batch.answer_BT & (batch.block_BT(size, origin) <= last_BT)


def position_ratios(batch: Batch, options: LossSection, generator: Generator) -> Tensor:
    """Draw the mask ratio of every position, (B, T); 0 where nothing may be masked.

    The ratios of a window are those of a document as long as it.
    """
    in_loss_BT = in_loss(batch, options)
    if batch.window_BT is None or batch.first_BT is None:
        block_BT = batch.block_BT(options.block_size, options.block_origin).clamp(min=0)
        D, N, number_BT = batch.documents, int(block_BT.max()) + 1, batch.document_BT.clamp(min=0)
    else:
        B, K = len(batch.ids_BT), options.windows
        D, N = B * K, options.window_blocks
        block_BT = (batch.position_BT - batch.first_BT).div(
            options.block_size, rounding_mode="floor"
        )
        row_B1 = torch.arange(B, device=block_BT.device)[:, None]
        number_BT = (row_B1 * K + batch.window_BT - 1).clamp(min=0)
        in_loss_BT &= batch.window_BT > 0
        block_BT = block_BT.where(in_loss_BT, 0)
    ratios_BT = block_ratios(options, D, N, generator)[number_BT, block_BT]
    return ratios_BT.where(in_loss_BT, 0.0)


def draw_mask(ratios_BT: Tensor, batch: Batch, generator: Generator) -> Tensor:
    """Mask every position independently with its ratio, but at least one in every row."""
    draws_BT = rand(*ratios_BT.shape, generator=generator)
    mask_BT = draws_BT < ratios_BT
    # Where nothing was masked, mask the position that came nearest to it.
    distance_BT = (draws_BT - ratios_BT).where(ratios_BT > 0, 2.0)
    return mask_BT.scatter(1, distance_BT.argmin(1, keepdim=True), True) & (ratios_BT > 0)


def divergence(student_MV: Tensor, teacher_MV: Tensor, options: LossSection) -> Tensor:
    """Compute the KL divergence at every position, (M,), in float32 or better.

    With a temperature both distributions are softened and the result is multiplied by its square,
    which keeps the gradients' size (Hinton et al. 2015).
    """
    dtype = torch.promote_types(student_MV.dtype, torch.float32)
    student_MV = F.log_softmax(student_MV.to(dtype) / options.temperature, -1)
    teacher_MV = F.log_softmax(teacher_MV.to(dtype) / options.temperature, -1)
    forward_M = reverse_M = torch.zeros((), dtype=dtype, device=student_MV.device)
    if options.kl != "reverse":
        forward_M = (teacher_MV.exp() * (teacher_MV - student_MV)).sum(-1)
    if options.kl != "forward":
        reverse_M = (student_MV.exp() * (student_MV - teacher_MV)).sum(-1)
    both = 0.5 if options.kl == "mixed" else 1.0
    return both * options.temperature**2 * (forward_M + reverse_M)


def d2f_loss(
    student: Logits,
    teacher: Logits,
    batch: Batch,
    options: LossSection,
    mask_id: int,
    generator: Generator,
) -> Loss:
    """Return the loss of one batch; the noise is drawn from `generator` alone."""
    prompt_block = options.block_size if options.prompt_attention == "block_causal" else None
    clean = batch
    if options.windows:
        batch = with_windows(batch, options, generator)
    ratios_BT = position_ratios(batch, options, generator)
    masked_BT = draw_mask(ratios_BT, batch, generator)
    noised_BT = batch.ids_BT.masked_fill(masked_BT, mask_id)
    rule = (options.block_size, prompt_block, options.block_origin)
    student_BTT = allowed(batch, "block_causal", *rule)

    def predicted(ids_BT: Tensor) -> Tensor:
        before = () if batch.before_BT is None else (batch.before_BT,)
        return student(ids_BT, batch.position_BT, student_BTT, masked_BT, *before)

    seen_BT = noised_BT
    if options.teacher_input == "student":
        with torch.no_grad():
            logits_MV = predicted(noised_BT)
            logits_MV[:, mask_id] = float("-inf")
            sure_M, token_M = logits_MV.float().softmax(-1).max(-1)
        # The rows that keep a masked position: without one there is nothing to learn from them.
        accepted_BT = masked_BT.clone()
        accepted_BT[masked_BT] = sure_M > options.accept
        accepted_BT &= (masked_BT & ~accepted_BT).any(1, keepdim=True)
        filled_BT = noised_BT.masked_scatter(masked_BT, token_M)
        noised_BT = seen_BT = torch.where(accepted_BT, filled_BT, noised_BT)
        masked_BT = masked_BT & ~accepted_BT
    elif options.teacher_input == "fresh":
        other_BT = draw_mask(ratios_BT, batch, generator)
        # Compared where both have a mask; a row that has no such position keeps the student's.
        none_B1 = ~(other_BT & masked_BT).any(1, keepdim=True)
        other_BT = torch.where(none_B1, masked_BT, other_BT)
        seen_BT = batch.ids_BT.masked_fill(other_BT, mask_id)
        masked_BT = masked_BT & other_BT
    # The autoregressive teacher knows nothing of what is behind the end of an answer.
    taught_BT = masked_BT & ~batch.tail_BT if options.teacher == "next_token" else masked_BT
    with torch.no_grad():
        if options.teacher == "bidirectional":
            full_BTT = allowed(batch, "full")
            teacher_MV = teacher(seen_BT, batch.position_BT, full_BTT, taught_BT)
        elif options.teacher == "next_token":
            teacher_MV = next_token_logits(teacher, clean, batch, taught_BT)
    student_MV = predicted(noised_BT)
    loss_M = torch.zeros(len(student_MV), device=student_MV.device)
    if not options.distils or options.teacher == "next_token" or options.data_weight:
        wide_MV = student_MV.to(torch.promote_types(student_MV.dtype, torch.float32))
        loss_M = F.cross_entropy(wide_MV, batch.ids_BT[masked_BT], reduction="none")
    if options.distils:
        taught_M = taught_BT[masked_BT]
        divergence_M = divergence(student_MV[taught_M], teacher_MV, options)
        if options.data_weight:
            divergence_M = divergence_M + options.data_weight * loss_M[taught_M]
        loss_M = loss_M.to(divergence_M.dtype).masked_scatter(taught_M, divergence_M)
    return summed(loss_M, batch, masked_BT, ratios_BT, options)


def next_token_logits(teacher: Logits, clean: Batch, batch: Batch, masked_BT: Tensor) -> Tensor:
    """Return what the autoregressive teacher predicts at masked positions of clean text, (M, V).

    It runs once over `clean`, however many windows of `batch` show a position.
    """
    row_M, at_M = masked_BT.nonzero().T
    if batch.window_BT is not None:
        at_M = batch.position_BT[masked_BT]  # one document in a row
    wanted_BT = torch.zeros_like(clean.answer_BT)
    wanted_BT[row_M, at_M] = True
    teacher_UV = teacher(clean.ids_BT, clean.position_BT, allowed(clean, "causal"), wanted_BT)
    number_BT = wanted_BT.flatten().cumsum(0).view(wanted_BT.shape) - 1
    return teacher_UV[number_BT[row_M, at_M]]


def summed(
    loss_M: Tensor, batch: Batch, chosen_BT: Tensor, ratios_BT: Tensor | None, options: LossSection
) -> Loss:
    """Weigh the positions' losses.

    The sum of w l is divided by the sum of w, or by the number of positions as the authors do.
    """
    plain_M = loss_M.detach()
    tail_M = batch.tail_BT[chosen_BT]
    weights_M = torch.ones_like(plain_M).masked_fill(tail_M, options.tail_weight)
    if options.weight == "inverse_ratio" and ratios_BT is not None:
        weights_M = weights_M / ratios_BT[chosen_BT]
    zero = plain_M.new_zeros(())
    whole = weights_M if options.normalise == "weights" else torch.ones_like(weights_M)
    return Loss(
        (loss_M * weights_M).sum(),
        whole.sum(),
        plain_M[~tail_M].mean() if (~tail_M).any() else zero,
        plain_M[tail_M].mean() if tail_M.any() else zero,
    )
