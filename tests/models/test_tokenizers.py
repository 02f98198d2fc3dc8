# SPDX-License-Identifier: Apache-2.0
"""Tokenizers in the official layouts load without remote code, in transformers and in vLLM."""

import json

import pytest
from checkpoints import END_TOKEN, MASK_TOKEN, byte_level_vocab, write_dream, write_llada
from transformers import AutoTokenizer

from vllm_d2f.models import register_configs

TEXT = "the other tin; 12 + 30 = 42\n"


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_configs()


def hf_tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


def vllm_tokenizer(path):
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(str(path), trust_remote_code=False)


@pytest.mark.parametrize("loader", [hf_tokenizer, vllm_tokenizer])
@pytest.mark.parametrize("vocab_size", [200, 600, 1200])
@pytest.mark.parametrize("write", [write_dream, write_llada])
def test_loads_and_round_trips(tmp_path, write, vocab_size, loader):
    path = write(tmp_path, vocab_size=vocab_size, hidden=8, layers=1)
    tokenizer = loader(path)
    assert tokenizer.is_fast
    assert len(tokenizer) == vocab_size
    assert tokenizer.eos_token_id == vocab_size - 1 and tokenizer.eos_token == END_TOKEN
    assert tokenizer.convert_tokens_to_ids(MASK_TOKEN) == vocab_size - 2
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT)  # merges took place
    assert tokenizer.encode(f"a{MASK_TOKEN}{END_TOKEN}")[-2:] == [vocab_size - 2, vocab_size - 1]
    assert tokenizer.decode([*ids, vocab_size - 1], skip_special_tokens=True) == TEXT
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "tin"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: tin\nassistant: "


def test_dream_layout_is_the_official_one(tmp_path):
    write_dream(tmp_path, hidden=8, layers=1)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "DreamTokenizer"
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    assert not (tmp_path / "tokenizer.json").exists()
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__module__ == "vllm_d2f.models.dream"


def test_dream_tokenizer_survives_saving(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_dream(tmp_path / "a", hidden=8, layers=1))
    tokenizer.save_pretrained(tmp_path / "b")
    config = (tmp_path / "a" / "config.json").read_text()
    (tmp_path / "b" / "config.json").write_text(config)
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("size", [96, 198, 256, 300, 5000])
def test_vocabulary_has_the_asked_size(size):
    vocab, merges = byte_level_vocab(size)
    assert sorted(vocab.values()) == list(range(size))
    assert all(a in vocab and b in vocab and a + b in vocab for a, b in merges)
