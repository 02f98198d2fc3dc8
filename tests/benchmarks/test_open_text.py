# SPDX-License-Identifier: Apache-2.0
"""Figures of open-ended text, worked by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import open_text
from benchmarks.harness.record import UsageError
from training.arithmetic import problems


def judged(ids, *odds):
    """Return an answer whose tokens the original gives these odds."""
    return {"ids": ids, "nats": [math.log(one) for one in odds]}


def test_n_grams_are_counted_within_an_answer():
    answer = [1, 2, 1, 2, 1]
    assert [open_text.distinct(answer, n) for n in (1, 2, 3)] == [(2, 5), (2, 4), (2, 3)]
    assert open_text.distinct([7, 7], 3) == (0, 0)


def test_the_original_judges_each_token_by_what_comes_before_it():
    def model(ids_1T):
        # Behind token t the original expects t + 1 with probability 1/2, three others with 1/6.
        logits_TV = torch.full((ids_1T.shape[1], 4), 1 / 6).log()
        logits_TV[range(ids_1T.shape[1]), (ids_1T[0] + 1) % 4] = math.log(1 / 2)
        return SimpleNamespace(logits=logits_TV[None])

    model.device = "cpu"
    found = open_text.surprises(model, [3, 0], [1, 2, 2])
    assert found == pytest.approx([math.log(2), math.log(2), math.log(6)], abs=1e-4)
    assert open_text.surprises(model, [3, 0], []) == []


def test_answers_are_compared_at_the_same_length():
    ours = [judged([1, 2, 3, 4], 2, 2, 9, 9), judged([])]
    theirs = [judged([1, 1], 8, 8), judged([5], 3)]
    row = open_text.compare(ours, theirs)
    assert row["compared"] == 1  # the empty answer has no other of its length
    assert (row["perplexity"], row["ar_perplexity"], row["perplexity_ratio"]) == (2, 8, 0.25)
    assert (row["distinct_1"], row["ar_distinct_1"]) == (1, 0.5)
    assert (row["distinct_2"], row["distinct_3"]) == (1, None)
    assert open_text.compare([judged([])], [judged([])]) == {"compared": 0}


def test_the_ratio_has_an_interval_over_the_prompts():
    ours = [judged([1], odds) for odds in (2, 4) * 20]
    row = open_text.compare(ours, [judged([1], 4)] * 40)
    low, high = row["perplexity_ratio_interval"]
    assert low < row["perplexity_ratio"] < high < 1
    assert row["perplexity_ratio"] == pytest.approx(2**-0.5, abs=1e-3)


def test_lengths_and_forwards_and_the_page():
    def answer(useful, forwards):
        return {"useful": useful, "forwards": forwards, "text": "a\nb"}

    answers = {"ar": [answer(6, 6)], "d2f 0.9": [answer(6, 2)]}
    parts = open_text.build(["p"], answers, dict.fromkeys(answers, [judged([1, 2], 2, 2)]))
    ar, d2f = parts["rows"]
    assert (ar["tokens_per_forward"], d2f["tokens_per_forward"], d2f["length"]) == (1, 3, 6)
    assert d2f["perplexity_ratio"] == 1
    report = {"command": "c", "models": {"d2f": "m"}, "max_tokens": 9, "dtype": "float32", **parts}
    text = "\n".join(open_text.markdown(report))
    assert "| d2f 0.9 | 1 | 6 | 3 | 1 | 2 | 2 | 1 | 1 to 1 |" in text and "**d2f 0.9**: a b" in text


def test_prompts_come_from_a_file(tmp_path):
    assert len(set(open_text.load_prompts(None, 64))) == 64
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    assert open_text.load_prompts(str(file), 2) == ["one", "two"]
    with pytest.raises(UsageError, match="2 prompts, 3 are needed"):
        open_text.load_prompts(str(file), 3)


@pytest.mark.slow
def test_quick(tmp_path):
    data = tmp_path / "prompts.txt"  # d2f-tiny knows no English
    data.write_text("".join(f"{p.question}\n" for p in problems("test", 4, 0)))
    given = ["--quick", "--data", str(data), "--json", str(tmp_path / "o.json")]
    assert open_text.main(given) == 0
    report = json.loads((tmp_path / "o.json").read_text())
    assert [row["decoder"] for row in report["rows"]] == ["ar", "d2f 0.5", "d2f 0.7", "d2f 0.9"]
    assert all(row["answers"] == 4 for row in report["rows"])
    assert report["rows"][0]["tokens_per_forward"] == 1 < report["rows"][1]["tokens_per_forward"]
