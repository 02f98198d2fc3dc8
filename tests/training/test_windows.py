# SPDX-License-Identifier: Apache-2.0
"""Windows beside a clean sequence give what a decoding in that state would give."""

import pytest
import torch
from torch import Generator
from transformers import LlamaConfig, LlamaForCausalLM

from training.attention import allowed
from training.config import LossSection
from training.data import Example, padded
from training.model import Predictor
from training.objectives import d2f_loss, next_token_logits, position_ratios
from training.windows import with_windows
from vllm_d2f.blocks import may_attend

MASK, END, BLOCK = 11, 10, 4
OPTIONS = LossSection(
    windows=3, window_blocks=2, block_size=BLOCK, teacher="data", prompt_attention="block_causal"
)


def generator(seed=0):
    return Generator().manual_seed(seed)


def batch(multiple=8):
    examples = [
        Example((1, 2, 3), (4, 5, 6, 7, 8, 9, 1, 2, 3, 4), "a"),
        Example((3, 2, 1, 9, 5), (6, 6, 1), "b"),
    ]
    return padded(examples, (3 + 12, 5 + 4), END, multiple)


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return Predictor(LlamaForCausalLM(config).double().eval(), True, "eager")


@pytest.mark.parametrize(
    ("prompt_block", "origin"), [(None, "prompt_end"), (BLOCK, "prompt_end"), (BLOCK, "zero")]
)
def test_a_window_sees_what_the_engine_would_show_it(predictor, prompt_block, origin):
    clean = batch()
    options = OPTIONS.model_copy(update={"block_origin": origin})
    wide = with_windows(clean, options, generator())
    T = clean.ids_BT.shape[1]
    assert wide.ids_BT.shape[1] == T + 3 * 2 * BLOCK
    mask = torch.zeros_like(wide.ids_BT, dtype=torch.bool)
    mask[:, T:] = torch.rand(mask[:, T:].shape, generator=generator(1)) < 0.6
    mask &= wide.position_BT >= wide.prompt_BT  # a window may begin with the end of the prompt
    noised = wide.ids_BT.masked_fill(mask, MASK)
    rule = allowed(wide, "block_causal", BLOCK, prompt_block, origin)
    logits = predictor(noised, wide.position_BT, rule, mask, wide.before_BT)
    found = dict(zip(map(tuple, mask.nonzero().tolist()), logits, strict=True))
    seen = 0
    for b in range(2):
        begin = int(clean.begin_BT(BLOCK, origin)[b, 0])
        for window in (1, 2, 3):
            at = (wide.window_BT[b] == window).nonzero()[:, 0]
            first = int(wide.first_BT[b, at[0]])
            assert (first - begin) % BLOCK == 0 and first <= int(clean.end_BT[b, 0])
            ids = torch.cat((clean.ids_BT[b, :first], noised[b, at]))[None]
            position = torch.arange(ids.shape[1])
            rule = (begin, BLOCK, prompt_block) if origin == "prompt_end" else (0, BLOCK)
            alone = may_attend(position[:, None], position, *rule)[None]
            everywhere = torch.ones_like(ids, dtype=torch.bool)
            everywhere[:, 0] = False
            own = predictor(ids, position[None], alone, everywhere)
            for column, index in enumerate(at.tolist()):
                if mask[b, index]:
                    torch.testing.assert_close(found[b, index], own[first + column - 1])
                    seen += 1
    assert seen == len(found) > 10


def test_behind_an_answer_end_tokens_follow_and_cut_answers_stay_open():
    wide = with_windows(batch(multiple=1), OPTIONS, generator(2))
    behind = (wide.position_BT > wide.end_BT) & (wide.window_BT > 0)
    assert behind.any() and (wide.ids_BT[behind] == END).all()
    cut = padded([Example((1, 2), (3, 4, 5, 6), "", ended=False)], [6], END)
    wide = with_windows(cut, OPTIONS, generator())
    inside = wide.document_BT >= 0
    assert (wide.position_BT[inside] < 6).all()
    ratios = position_ratios(wide, OPTIONS, generator())
    assert (ratios[~inside] == 0).all() and (ratios[wide.window_BT == 0] == 0).all()


def test_the_autoregressive_teacher_reads_the_clean_text_once(predictor):
    clean = batch()
    wide = with_windows(clean, OPTIONS, generator())
    mask = (wide.window_BT > 0) & ~wide.tail_BT & (wide.position_BT % 2 == 0)
    asked = []

    def teacher(*args):
        asked.append(args[0].shape)
        return predictor(*args)

    logits = next_token_logits(teacher, clean, wide, mask)
    assert asked == [clean.ids_BT.shape]
    whole = predictor.net(clean.ids_BT[:1]).logits[0]
    rows, columns = mask.nonzero().T
    for number in (rows == 0).nonzero()[:, 0].tolist():
        position = int(wide.position_BT[0, columns[number]])
        torch.testing.assert_close(logits[number], whole[position - 1])


@pytest.mark.parametrize("windows", [0, 3])
@pytest.mark.parametrize("teacher", ["data", "next_token"])
def test_losses_of_both_teachers(predictor, windows, teacher):
    options = OPTIONS.model_copy(update={"windows": windows, "teacher": teacher, "tail_weight": 0})

    def never(*args):
        raise AssertionError("the answers themselves need no teacher")

    other = predictor if teacher == "next_token" else never
    loss = d2f_loss(predictor, other, batch(), options, MASK, generator(3))
    assert torch.isfinite(loss.total) and loss.total > 0
    # The same network knows more from the clean text on the left, so the two differ; a student
    # that is its teacher at every position would have none.
    again = d2f_loss(predictor, other, batch(), options, MASK, generator(3))
    assert torch.equal(loss.total, again.total)
