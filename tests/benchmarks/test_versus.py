# SPDX-License-Identifier: Apache-2.0
"""The comparison with what a user would pick instead: scores with intervals, ratios by run."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import versus
from benchmarks.harness.engine import Answer, Batch
from benchmarks.harness.record import UsageError
from benchmarks.harness.vanilla import Setting
from benchmarks.harness.workload import Item
from benchmarks.tasks.jobs import JOBS, load_job
from training.intervals import difference, interval

FACTS = dict.fromkeys(
    ("name", "type", "food", "price", "rating", "area", "family_friendly", "near")
)  # fmt: skip
RIGHT = json.dumps(FACTS)


class Tokenizer:
    chat_template = "x"

    def apply_chat_template(self, turns, **options):
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"[{turns[0]['content']}]"


def answer(item, text, seconds, forwards):
    made = Answer(item, False, False, 12, 12, forwards, 12, 5, seconds, seconds, text)
    return Batch(seconds, seconds, forwards, (made,), 1.0)


def test_prompts_are_asked_as_a_chat_asks_them(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    (item,) = load_job(str(file), 1, 0, Tokenizer())
    assert (item.question, item.answer) == ("[a]", "b")
    with pytest.raises(UsageError, match="1 records, 2 are needed"):
        load_job(str(file), 2, 0, Tokenizer())
    file.write_text(json.dumps({"question": "q", "answer": "#### 4"}) + "\n")  # GSM8K's
    assert load_job(str(file), 1, 0, Tokenizer())[0].question == "[q]"
    file.write_text('{"question": 1}\n')
    with pytest.raises(UsageError, match=r"training\.extract"):
        load_job(str(file), 1, 0, Tokenizer())


def test_an_interval_holds_the_score_and_shrinks_with_more_answers():
    few, many = ([(i % 4 > 0, 1.0) for i in range(n)] for n in (40, 4000))
    for counts in (few, many):
        score, low, high = interval(counts)
        assert score == 0.75 and low < 0.75 < high
    assert interval(many)[2] - interval(many)[1] < 0.1 * 2 < interval(few)[2] - interval(few)[1]


def test_a_difference_is_of_the_same_questions():
    hard_and_easy = [(i % 2, 1.0) for i in range(100)]
    assert difference(hard_and_easy, hard_and_easy) == (0, 0, 0)
    worse = [(0.0, 1.0)] * 10 + hard_and_easy[10:]
    score, low, high = difference(worse, hard_and_easy)
    assert score == pytest.approx(-0.05) and low < -0.05 < high <= 0


def test_scores_and_ratios(tmp_path):
    items = [Item("q", 0.0, RIGHT), Item("p", 0.0, RIGHT)]
    broken = RIGHT[:-1]
    ar = [answer(0, RIGHT, 2.0, 12), answer(1, RIGHT, 2.0, 12)]
    d2f = [answer(0, RIGHT, 1.0, 3), answer(1, broken, 1.0, 3)]
    both = {"d2f": [asdict(b) for b in d2f], "ar": [asdict(b) for b in ar]}
    points = {"scores": both, "run 0, batch 1": both}
    points["load 0.5"] = {name: of[:1] for name, of in both.items()}
    report = versus.build(JOBS["extract"], items, [1], 1, points)
    assert report["scores"]["d2f"]["score"] == 0.5 and report["scores"]["d2f"]["valid"] == 0.5
    assert report["scores"]["ar"]["score_interval"] == [1.0, 1.0]
    assert report["scores"]["d2f"]["tokens_per_forward"] == 4.0
    by_name = {point["decoder"]: point for point in report["points"]}
    assert by_name["d2f"]["against_ar"]["median"] == 2.0
    report |= {"job": "extract", "command": "x"}
    text = "\n".join(versus.markdown(report))
    assert (
        "| d2f | 2 | 0.5 | 0 to 1 |" in text and "| 1 | d2f | 12 (12 to 12) | 2 (2 to 2) |" in text
    )
    assert by_name["d2f"]["score"] == 0.5 and not by_name["ar"]["leaves_the_control"]
    (loaded,) = (row for row in report["loads"] if row["decoder"] == "d2f")
    assert (loaded["load"], loaded["answer_s_p50"], loaded["median_against_ar"]) == (0.5, 1.0, 2.0)

    versus.draw(report, tmp_path / "versus.png")
    assert (tmp_path / "versus.png").stat().st_size > 10_000


def test_questions_about_what_training_has_not_seen_are_scored_apart():
    rights = [json.dumps(FACTS | {"name": name}) for name in ("Zizzi", "The Mill")]
    items = [Item("q", 0.0, right) for right in rights]
    cut_off = replace(answer(1, rights[1], 1.0, 3).answers[0], ended=False)
    batch = replace(answer(0, rights[0], 1.0, 3), answers=(cut_off,))
    points = {"d2f": [asdict(answer(0, rights[0], 1.0, 3)), asdict(batch)]}
    points["ar"] = [asdict(answer(0, RIGHT, 1.0, 3)), asdict(batch)]
    d2f, ar = versus.scored(JOBS["extract"], items, points).values()
    assert d2f["score"] == 0.5 and d2f["slots_unseen"] == 1.0 and d2f["answers_unseen"] == 1
    assert ar["slots_unseen"] == 7 / 8 and ar["agreement"] == 1.0
    assert d2f["agreement"] == 0.5 and d2f["agreement_interval"] == [0.0, 1.0]


def test_numbers_are_scored_and_compared():
    job = JOBS["number"]
    assert job.counts("so 1,234\n#### 1,234", "It is 1234.") == (1.0, 1.0)
    assert job.counts("#### 4", "four") == (0.0, 1.0) == job.counts("#### 4", "4 or 5")
    assert job.same("so 5", "#### 5") and not job.same("", "")


def test_a_schema_needs_a_job_that_has_one(capsys):
    assert versus.parse(["--job", "extract", "--schema"]).schema
    with pytest.raises(SystemExit):
        versus.parse(["--schema"])
    assert "the job exact has no JSON schema" in capsys.readouterr().err


class Fake:
    """A worker that says what it was asked."""

    def measure(self, items, how):
        return [(item.schema, how) for item in items]


def test_vanilla_diffusion_takes_part_alone():
    workers, canvas = {"d2f": Fake(), "vanilla 8:1": Fake()}, Setting.parse("8:1")
    vanilla, asked = {"vanilla 8:1": canvas}, {"": None, "+schema": {"const": 1}}
    alone = versus.measure([Item("q", 0.0)], 1, 0, workers, asked, vanilla)
    assert alone["vanilla 8:1"] == [(None, canvas)]
    assert alone["d2f+schema"] == [({"const": 1}, 1)] and set(alone) > {"d2f"}
    assert set(versus.measure([], 4, 1, workers, asked, vanilla)) == {"d2f", "d2f+schema"}


def test_vanilla_diffusion_is_compared_on_the_timed_questions(tmp_path, capsys):
    items = [Item("q", 0.0, RIGHT), Item("p", 0.0, RIGHT)]
    ar = [asdict(answer(0, RIGHT, 2.0, 12)), asdict(answer(1, RIGHT, 2.0, 12))]
    points = {"scores": {"ar": ar}}
    slow = [asdict(answer(0, RIGHT[:-1], 20.0, 64))]
    points["run 0, batch 1"] = {"ar": ar[:1], "vanilla 64:1": slow}
    report = versus.build(JOBS["extract"], items, [1], 1, points)
    (row,) = (row for row in report["points"] if row["decoder"] == "vanilla 64:1")
    assert row["score"] == 0.0 and row["leaves_the_control"]
    assert row["against_ar"]["median"] == pytest.approx(0.1)
    versus.draw(report, tmp_path / "versus.png")
    with pytest.raises(SystemExit):
        versus.parse(["--teacher", "dream-tiny", "--batch-sizes", "4"])
    assert "compared at batch size 1" in capsys.readouterr().err
    assert versus.main(["--teacher", "dream-tiny", "--vanilla", "8:9"]) == 2
    assert "tokens per step must be in [1, length]" in capsys.readouterr().err


@pytest.mark.slow
def test_an_item_with_a_schema_is_answered_under_it(monkeypatch):
    from benchmarks.harness.engine import Engine, shut_down

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engine = Engine("d2f-tiny", mode="eager", max_batch=2, max_tokens=16, options={})
    plain = Item("2 + 2", 4.0)
    (batch,) = engine.measure([plain, replace(plain, schema={"const": "sale"})], 2)
    assert [a.text == '"sale"' for a in batch.answers] == [False, True]
    shut_down(engine.llm)


def test_arrivals_come_at_the_rate_that_was_asked_for():
    at_s = versus.arrivals(4000, 8.0, seed=1)
    assert at_s[0] == 0.0 and at_s == sorted(at_s) == versus.arrivals(4000, 8.0, seed=1)
    assert at_s[-1] / 4000 == pytest.approx(1 / 8.0, rel=0.05)


@pytest.mark.slow
def test_quick(tmp_path):
    teacher = ["--teacher", "dream-tiny", "--vanilla", "64:8"]
    assert versus.main(["--quick", *teacher, "--json", str(tmp_path / "v.json")]) == 0
    report = json.loads((tmp_path / "v.json").read_text())
    assert set(report["scores"]) == {"d2f", "ar", "ar+ngram"}
    assert all(row["answers"] == 8 for row in report["scores"].values())
    assert report["scores"]["ar"]["score"] > 0.8
    (row,) = (row for row in report["points"] if row["decoder"] == "vanilla 64:8")
    assert row["batch_size"] == 1 and row["score"] > 0.5 and row["tokens_per_forward"] > 1
