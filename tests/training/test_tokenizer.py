# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: one token per word and digit, any text, nothing added."""

import pytest
from transformers import Qwen2Tokenizer

from training.arithmetic import problems
from training.tokenizer import SPECIAL, build_tokenizer, padded_vocab_size, vocabulary_texts


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_word_digit_and_symbol_is_one_token(tokenizer):
    for text in vocabulary_texts():
        assert len(tokenizer(text).input_ids) == 1, text


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize("34+ 125") == ["3", "4", "+", "Ġ", "1", "2", "5"]


def test_lengths_depend_on_the_number_of_steps_only(tokenizer):
    for problem in problems("validation", 100, seed=2):
        steps = len(problem.steps)
        prompt, answer = (tokenizer(t).input_ids for t in (problem.question, problem.answer))
        assert len(prompt) == 14 + 6 * steps
        assert len(answer) == 2 + 6 * steps
        assert tokenizer(problem.question + problem.answer).input_ids == prompt + answer
        assert tokenizer.decode(answer) == problem.answer


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, "é漢字🙂"]}\n\tx', "  two  spaces ", "Ünïcode_und-mehr 007", "def f():\n  pass"],
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_qwen2_tokenizer_reads_the_same_tokens(tokenizer, tmp_path):
    """transformers picks this class for model_type qwen2, whatever the files say."""
    tokenizer.save_pretrained(tmp_path)
    other = Qwen2Tokenizer.from_pretrained(tmp_path)
    texts = [p.question + p.answer for p in problems("test", 50, seed=0)]
    for text in [*texts, "Tom's 34,\n\n don't  x", "e\u0301 \u00e9 \u6f22\u5b57"]:
        assert other(text).input_ids == tokenizer(text).input_ids
        assert other.decode(other(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)


def test_special_tokens(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    assert len(set(ids)) == len(SPECIAL)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ids[0]
    assert tokenizer.mask_token_id == ids[1]
    assert padded_vocab_size(tokenizer) % 64 == 0 and padded_vocab_size(tokenizer) >= len(tokenizer)


def test_chat_gives_the_ids_of_the_plain_prompt(tokenizer):
    question = problems("test", 1, seed=0)[0].question
    message = [{"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert chat == question
    assert tokenizer(chat, add_special_tokens=False).input_ids == tokenizer(question).input_ids
