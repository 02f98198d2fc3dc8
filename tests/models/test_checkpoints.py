# SPDX-License-Identifier: Apache-2.0
"""The random checkpoints are worth testing with: varied proposals, confidences all over (0, 1)."""

import pytest
import torch
from checkpoints import hf_twin, write_dream, write_llada
from safetensors.torch import load_file

PROMPT, BLOCK, BLOCKS = 13, 8, 4


@torch.no_grad()
def proposals(path, shift):
    """Token and confidence of every masked position in windows that are decided more and more."""
    model = hf_twin(path)
    mask_id = model.config.vocab_size - 2
    position = torch.arange(PROMPT + BLOCK * BLOCKS)
    block = torch.where(position < PROMPT, 0, 1 + (position - PROMPT) // BLOCK)
    bias = torch.where(block[None, :] <= block[:, None], 0.0, torch.finfo(torch.float32).min)
    tokens, confidences = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, mask_id, position.shape, generator=generator)
        share = 1.0 - block / BLOCKS  # later blocks are decided less
        masked = torch.rand(position.shape, generator=generator) >= share
        masked &= position >= PROMPT
        logits = model(ids.where(~masked, mask_id)[None], attention_mask=bias[None, None]).logits[0]
        rows = logits.roll(1, 0) if shift else logits
        rows[:, mask_id] = -torch.inf
        confidence, token = rows[masked].softmax(-1).max(-1)
        tokens.append(token)
        confidences.append(confidence)
    return torch.cat(tokens), torch.cat(confidences)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("write", "shift"), [(write_dream, True), (write_llada, False)])
def test_proposals_vary(tmp_path, write, shift, seed):
    tokens, confidences = proposals(write(tmp_path, seed=seed, tokenizer=False), shift)
    assert tokens.unique().numel() > 40
    assert tokens.bincount().max() < 0.5 * len(tokens)
    assert 0.05 < (confidences > 0.9).float().mean() < 0.5
    assert (confidences < 0.5).float().mean() > 0.1


@pytest.mark.parametrize("write", [write_dream, write_llada])
def test_same_seed_same_weights_in_any_number_of_shards(tmp_path, write):
    def weights(path):
        return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}

    one = weights(write(tmp_path / "one", tokenizer=False))
    four = weights(write(tmp_path / "four", shards=4, tokenizer=False))
    assert one.keys() == four.keys() and all(torch.equal(one[k], four[k]) for k in one)
    half = write(tmp_path / "half", dtype=torch.bfloat16, tokenizer=False)
    assert {t.dtype for t in weights(half).values()} == {torch.bfloat16}
    assert {p.dtype for p in hf_twin(half).parameters()} == {torch.float32}
