# SPDX-License-Identifier: Apache-2.0
"""Experiments on records: the job's score, its intervals, and a stage that is trained once."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.test_autoregressive import STAGE, chain
from training.attention import allowed
from training.config import ConfigError
from training.data import Example, padded
from training.evaluate import d2f_outputs
from training.experiments import load_plan, main, table
from training.extract import KEYS
from training.intervals import difference, interval
from training.model import Predictor, PrefixCache, load
from training.train import train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "configs"
RESULTS = ROOT / "benchmarks" / "results"
LOSS = {"block_size": 4, "prompt_attention": "block_causal", "teacher": "data"}
SHORT = {**STAGE, "steps": 2, "evaluate": 0}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def plan_of(tmp_path, **changes):
    config = chain(tmp_path)
    answer = json.dumps(dict.fromkeys(KEYS))
    lines = [{"prompt": f"Tom has {n} apples", "response": answer} for n in range(5)]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "config": {
            **{k: config.model_dump(mode="json")[k] for k in ("name", "model")},
            "data": {"source": config.data.source, "validation": str(held), "max_length": 128},
            "decoding": {"block_size": 4, "max_blocks": 2, "max_tokens": 8},
            "stages": {
                "teacher": {"objective": "next_token", **SHORT},
                "full": {"objective": "diffusion", "start": "teacher", **SHORT},
                "student": {
                    "objective": "d2f", "start": "teacher", **SHORT,
                    "loss": LOSS,
                },
            },
        },
        "seeds": [1, 2],
        "thresholds": [0.5],
        "problems": 3,
        "drawn": 1,
        "score": "slots",
        "variants": {
            "default": {},
            "wide": {"loss": {"block_size": 8}},
            "paper": {"start": "full", "loss": {"teacher": "bidirectional"}},
        },
        "groups": {"all": {"variants": ["default", "wide", "paper"], "text": "Words."}},
        **changes,
    }  # fmt: skip
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(values))
    return file, config


def test_they_run_go_on_and_report(tmp_path):
    file, config = plan_of(tmp_path)
    train(config, tmp_path / "twin", ("twin",))
    results = tmp_path / "results"
    arguments = ["--config", str(file), "--out", str(tmp_path / "w"), "--results", str(results),
                 "--teacher", str(tmp_path / "twin" / "twin" / "final.safetensors")]  # fmt: skip
    main([*arguments, "--variants", "default"])
    alone = results.with_suffix(".md").read_text()
    assert "## all" not in alone, "nothing stands beside it yet"
    main(arguments)
    kept = (tmp_path / "w" / "runs.jsonl").read_text().splitlines()
    assert len(kept) == 6 and len(set(kept)) == 6
    full = (tmp_path / "w" / "full" / "final.safetensors").stat().st_mtime_ns
    report = json.loads(results.with_suffix(".json").read_text())
    rows = {row["variant"]: row for row in report["table"]}
    assert rows["wide"]["decode_block"] == 8, "decoded in the blocks that it was trained with"
    assert rows["paper"]["start_seconds"] > 0 == rows["default"]["start_seconds"]
    for run in report["runs"]:
        (score,) = run["scores"]
        assert [answer["forwards"] for answer in score["answers"]] != []
        assert len(score["answers"]) == 3
    text = results.with_suffix(".md").read_text()
    assert "| paper | 4 | 2 |" in text and "[+0.0, +0.0]" in text
    main([*arguments, "--report-only"])
    assert results.with_suffix(".md").read_text() == text
    assert (tmp_path / "w" / "full" / "final.safetensors").stat().st_mtime_ns == full
    with pytest.raises(ConfigError, match="score: 'bleu' is none of"):
        load_plan(plan_of(tmp_path, score="bleu")[0])


def test_the_plan_of_the_language_model_is_valid():
    plan = load_plan(CONFIGS / "experiments_extract.yaml")
    assert plan.of_records and plan.score == "slots" and len(plan.seeds) > 1
    assert {v for group in plan.groups.values() for v in group["variants"]} == set(plan.variants)
    students = [plan.of(name, 1).stages["student"] for name in plan.variants]
    updates = {(student.steps, student.batch_size) for student in students}
    assert len(updates) == 1, "at equal compute"


def test_committed_results_are_drawn_again(tmp_path):
    for name, config in (
        ("training_experiments", "experiments"),
        ("training_prompt_attention", "prompt_attention"),
        ("training_experiments_extract", "experiments_extract"),
        ("training_experiments_extract_teacher", "experiments_extract"),
    ):
        report = json.loads((RESULTS / f"{name}.json").read_text())
        plan = load_plan(CONFIGS / f"{config}.yaml")
        assert json.loads(json.dumps(table(plan, report["runs"]))) == report["table"]


def test_the_kept_beginning_changes_no_answer(tmp_path):
    config = chain(tmp_path)
    loaded = load(config.model, "eager")
    predictor = Predictor(loaded.model.eval(), loaded.shift, "eager")
    examples = [Example(tuple(range(5, 5 + n)), (), "") for n in (6, 9, 8, 4)]
    decoding = config.decoding.model_copy(update={"max_tokens": 16, "tau_conf": 0.05})
    computed: list[int] = []
    loaded.model.model.register_forward_hook(lambda *of: computed.append(of[2][0].shape[1]))
    for rule in ((4, "prompt_end"), (None, "prompt_end"), (4, "zero")):
        given = (examples, (loaded.end,), loaded.mask_id, decoding, *rule)
        dense = d2f_outputs(predictor, *given)
        whole, computed[:] = sum(computed), []
        assert d2f_outputs(PrefixCache(predictor), *given) == dense, rule
        assert sum(computed) < 0.8 * whole
        computed[:] = []


def test_the_kept_beginning_gives_the_same_logits(tmp_path):
    loaded = load(chain(tmp_path).model, "eager")
    predictor = Predictor(loaded.model.eval(), loaded.shift, "eager")
    cached = PrefixCache(predictor)
    rows = [[5, 6, 7, 8, 1, 1], [5, 6, 7, 8, 9, 1, 1, 1], [5, 6, 7, 3, 9, 1], [5, 6, 7, 3, 9, 1]]
    for row, rule in zip(
        rows, ("block_causal", "block_causal", "block_causal", "full"), strict=True
    ):
        batch = padded([Example(tuple(row), (), "")], [len(row)], 0)
        chosen = torch.arange(len(row))[None] > 0
        given = (batch.ids_BT, batch.position_BT, allowed(batch, rule, 2, 2), chosen)
        with torch.inference_mode():
            torch.testing.assert_close(cached(*given), predictor(*given), rtol=1e-4, atol=1e-5)


def test_intervals_are_over_answers_and_trainings():
    counts = [(float(at % 3), 1.0) for at in range(60)]
    middle, low, high = interval(counts)
    assert low < middle == 1.0 < high
    apart = [(1.0, 1.0)] * 20 + [(0.0, 1.0)] * 20
    assert interval(apart, runs=2)[1:] == (0.0, 1.0), "two trainings that differ in every answer"
    assert difference(counts, counts, runs=2) == (0.0, 0.0, 0.0)
