# SPDX-License-Identifier: Apache-2.0
"""The job `restore`: transcripts that a seed decides, and scores."""

import json
import re

import pytest

from training.restore import (
    degrade,
    exchange,
    main,
    plain_sentences,
    scores,
    spoken,
    vocabulary,
    word_errors,
    written,
)

TEXT = "Natalia sold 48 clips, and she sold $1,200 worth in May. How many?"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("He paid $1.50.", "he paid one dollar and fifty cents"),
        ("$0.01 or $1", "one cent or one dollar"),
        ("a $5 fee, $2 million", "a five dollar fee two million dollars"),
        ("3/4 of 2 1/2 cups", "three quarters of two and one half cups"),
        ("at 5:30, at 6:00, at 7:05", "at five thirty at six o'clock at seven oh five"),
        ("the 2nd of 1,005", "the second of one thousand five"),
        ("one hundred and five", "one hundred five"),
        ("50% & 0.25", "fifty percent and zero point two five"),
        ("a 120-page “book”", "a one hundred twenty page book"),
        ("Don't say 007", "don't say seven"),
    ],
)
def test_texts_as_they_are_said(text, words):
    assert " ".join(spoken(text)) == words


def test_a_seed_decides_a_transcript():
    heard = degrade(TEXT, 1)
    assert heard == degrade(TEXT, 1) and heard == heard.upper()
    assert degrade(TEXT, 1, capitals=False) == heard.lower()
    plain = (
        "NATALIA SOLD FORTY EIGHT CLIPS AND SHE SOLD ONE THOUSAND TWO HUNDRED DOLLARS WORTH IN MAY"
    )
    assert degrade(TEXT, 1, slips=False) == plain + " HOW MANY"
    many = [degrade(TEXT, seed) for seed in range(200)]
    slipped = [heard for heard in many if heard != plain + " HOW MANY"]
    assert 40 < len(slipped) < 100, "about half of the texts get slips, some of them none"
    assert all(len(heard.split()) >= len(plain.split()) for heard in many)
    assert any(" UM " in heard for heard in many) and any("SOLD SOLD" in heard for heard in many)


class Vocabulary:
    def get_vocab(self):
        return dict.fromkeys(
            ["Ġwalrus", "Ġmelt", "ĠOslo", "ĠRaymond", "walk", "Ġof", "Ġa1bcd", "Ġtwelve"], 0
        )


def test_other_words_take_the_place_of_a_share():
    """Alike wherever they stand; what is written in digits and signs stays."""
    words = vocabulary(Vocabulary())
    assert words == (["melt", "walrus"], ["Oslo", "Raymond"])
    text = "Mary's nails cost 4 dollars. Mary sold two hundred nails."
    found = exchange(text, 3, words, 1.0)
    name, thing = re.fullmatch(
        r"(\w+)'s (\w+) \w+ 4 dollars\. \1 \w+ two hundred \2\.", found
    ).groups()
    assert name in words[1] and thing in words[0]
    assert exchange(text, 3, words, 1.0) == found and exchange(text, 3, words, 0.0) == text
    assert len({exchange(text, seed, words, 0.5) for seed in range(20)}) > 5


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TEXT, {"word_error_rate": 0, "punctuation_f1": 1, "case_f1": 1, "numbers": 1, "exact": 1}),
        (TEXT.lower(), {"word_error_rate": 0, "punctuation_f1": 1, "case_f1": 0, "numbers": 1}),
        # Said alike, written otherwise.
        (TEXT.replace("48", "forty-eight"), {"word_error_rate": 0, "numbers": 0.5, "exact": 0}),
        (TEXT.replace("clips,", "clips"), {"punctuation_f1": 0.8, "word_error_rate": 0}),
        (TEXT.replace("clips", "nails"), {"word_error_rate": 1 / 18, "case_f1": 1}),
        ("", {"word_error_rate": 1, "punctuation_f1": 0, "case_f1": 0, "numbers": 0, "exact": 0}),
    ],
)
def test_scores(found, expected):
    result = scores([(TEXT, found)])
    for name, value in expected.items():
        assert result[name] == pytest.approx(value), name


def test_word_errors_are_the_fewest_edits():
    assert word_errors([("a b c d", "a c x d e")]) == (3, 4)
    assert word_errors([("one two", "one two"), ("three", "")]) == (1, 3)


def test_records_are_written_from_questions_and_answers(tmp_path):
    answer = "She sold 48/2 = <<48/2=24>>24 in May.\nThat is  half of   them.\n#### 24"
    assert plain_sentences(answer) == "That is half of them."
    source = tmp_path / "texts.jsonl"
    records = [{"question": TEXT, "answer": answer}, {"question": "Señor X?", "answer": "#### 1"}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out.jsonl"
    main([str(source), "--out", str(out), "--copies", "3", "--capitals", "0.5", "--answers"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 6, "three transcripts of two texts; what is not ASCII is left out"
    assert {line["response"] for line in lines} == {written(TEXT), "That is half of them."}
    assert {line["prompt"].isupper() for line in lines} == {True, False}
    before = out.read_text()
    with pytest.raises(SystemExit):
        main([str(source), "--out", str(out)])
    out.unlink()
    main([str(source), "--out", str(out), "--copies", "3", "--capitals", "0.5", "--answers"])
    assert out.read_text() == before
    with pytest.raises(SystemExit):  # whose words?
        main([str(source), "--out", str(tmp_path / "other.jsonl"), "--exchange", "0.2"])
    with pytest.raises(SystemExit):
        main([str(source), "--out", str(tmp_path / "other.jsonl"), "--exchange", "1.5"])
