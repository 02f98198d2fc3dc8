# SPDX-License-Identifier: Apache-2.0
"""The job `extract`: what a sentence states, exchanged values, scores."""

import json

import pytest

from training.extract import KEYS, answer, exchange, main, scores, sentences, stated, unseen

LINE = (
    "name : The Mill | Type : pub | food : Indian | price : less than £ 20 | customer rating : low"
    " | area : riverside | family friendly : yes | near : Raja Indian Cuisine||"
)


def read(tmp_path, sentence, line=LINE):
    path = tmp_path / "e2e.txt"
    path.write_text(line + sentence + "\n", encoding="utf-8")
    return next(sentences(path))


def test_marks_stand_where_people_write_them(tmp_path):
    text, facts = read(tmp_path, "The Mill , a family - friendly pub ( £ 20 ) , doesn 't close . ")
    assert text == "The Mill, a family-friendly pub (£20), doesn't close."
    assert list(facts) == list(KEYS) and facts["price"] == "less than £20"


def test_facts_left_out_are_null(tmp_path):
    text, facts = read(tmp_path, "The Mill is a low priced pub near Raja Indian Cuisine .")
    found = stated(text, facts)
    assert found == dict.fromkeys(KEYS) | {
        "name": "The Mill",
        "type": "pub",
        "price": "less than £20",
        "near": "Raja Indian Cuisine",
    }


def test_a_named_value_replaces_the_given_one(tmp_path):
    text, facts = read(tmp_path, "The Mill is a cheap restaurant in the city centre .")
    found = stated(text, facts)
    assert (found["type"], found["price"], found["area"]) == ("restaurant", "cheap", "city centre")
    assert found["near"] is None


def test_two_named_values_leave_the_given_one(tmp_path):
    text, facts = read(tmp_path, "The Mill is a pub and restaurant .")
    assert stated(text, facts)["type"] == "pub"


def test_exchanged_values_stand_in_the_sentence(tmp_path):
    text, facts = read(
        tmp_path, "The Mill is an Indian pub at the riverside near Raja Indian Cuisine"
    )
    facts = stated(text, facts)
    seen = set()
    for seed in range(50):
        new_text, new = exchange(text, facts, str(seed))
        assert exchange(text, facts, str(seed)) == (new_text, new)
        for key in ("name", "near", "food", "type", "area"):
            assert new[key].lower() in new_text.lower()
        assert new["rating"] is None and new["family_friendly"] is None
        seen.add((new["food"], new["type"]))
    assert len(seen) > 10


def test_a_line_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"e2e\.txt:1: not a line"):
        read(tmp_path, "", line="size : 3||Small .")


def test_scores(tmp_path):
    _, facts = read(tmp_path, "x")
    right = answer(facts)
    assert scores([(right, right)]) == {"slots": 1, "records": 1, "valid": 1}
    one_wrong = answer(facts | {"area": None})
    found = scores([(right, one_wrong), (right, right[:-1])])
    assert found == {"slots": 7 / 16, "records": 0, "valid": 0.5}
    assert scores([(right, "[]"), (right, "{}")]) == {"slots": 0, "records": 0, "valid": 0.5}


def test_a_sentence_is_unseen_if_all_its_names_are(tmp_path):
    _, facts = read(tmp_path, "x")
    assert not unseen(answer(facts)) and unseen(answer(facts | {"name": "Zizzi", "near": None}))
    assert not unseen(answer(facts | {"name": "Zizzi"}))


def test_the_command_writes_copies(tmp_path):
    read(tmp_path, "The Mill is an Indian pub .")
    main([str(tmp_path / "e2e.txt"), "--out", str(tmp_path / "out.jsonl"), "--copies", "3"])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines].count("The Mill is an Indian pub.") == 1
    with pytest.raises(SystemExit):  # what is there stays
        main([str(tmp_path / "e2e.txt"), "--out", str(tmp_path / "out.jsonl")])
    assert len(lines) == 3 and all(json.loads(line["response"])["rating"] is None for line in lines)
