# SPDX-License-Identifier: Apache-2.0
"""Model, training loop and the chain: equal to transformers, resumable, runnable."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training.arithmetic import problems
from training.evaluate import causal_bias
from training.export import export
from training.fit import FitConfig, fit
from training.model import ModelConfig, TinyQwen2
from training.report import load_exported, load_in_transformers
from training.stages import Recipe, block_causal_bias, train_ar, train_student, train_teacher
from training.tiny import demo_problems, run
from training.tokenizer import build_tokenizer, padded_vocab_size
from vllm_d2f.d2f import D2FParams, may_attend
from vllm_d2f.models import register_configs

FIT = FitConfig(steps=6, batch_size=4, save_every=3, log_every=1, warmup=2)
RECIPE = Recipe(
    step_counts=(2, 3), ar=FIT, teacher=FIT, student=FIT, bf16=False, compile=False, watched=4
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def config(tokenizer):
    return ModelConfig(
        padded_vocab_size(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2
    )


def randomised(config):
    torch.manual_seed(0)
    model = TinyQwen2(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["ar", "dream", "d2f"])
def test_exported_weights_give_the_same_logits_in_transformers(tmp_path, tokenizer, config, kind):
    model = randomised(config)
    export(model, tokenizer, kind, D2FParams(block_size=4), tmp_path / kind)
    theirs = load_in_transformers(tmp_path / kind)
    ids = torch.randint(0, config.vocab_size, (2, 13))
    position = torch.arange(13)
    allowed = may_attend(position[:, None], position[None], 5, 4)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=allowed.expand(2, 1, 13, 13)).logits
        got = model(ids, block_causal_bias(13, 5, 4))
        again = load_exported(tmp_path / kind)(ids, block_causal_bias(13, 5, 4))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got, again)


def test_ar_export_loads_without_help(tmp_path, tokenizer, config):
    model = randomised(config)
    export(model, tokenizer, "ar", D2FParams(), tmp_path / "ar")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ar", dtype=torch.float32)
    assert AutoConfig.from_pretrained(tmp_path / "ar").model_type == "qwen2"
    ids = torch.randint(0, config.vocab_size, (1, 9))
    with torch.no_grad():
        expected, got = theirs(ids).logits, model(ids, causal_bias(9))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ar")
    question = problems("test", 1, seed=0)[0].question
    assert loaded(question).input_ids == tokenizer(question).input_ids
    chat = loaded.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    assert chat == question


def test_dream_tokenizer_is_the_trained_one_under_the_plugin(tmp_path, tokenizer, config):
    export(randomised(config), tokenizer, "d2f", D2FParams(), tmp_path / "d2f")
    register_configs()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "d2f")
    for problem in problems("test", 10, seed=0):
        assert loaded(problem.question).input_ids == tokenizer(problem.question).input_ids
    assert loaded.mask_token_id == AutoConfig.from_pretrained(tmp_path / "d2f").mask_token_id


def test_export_writes_what_each_kind_needs(tmp_path, tokenizer, config):
    model = randomised(config)
    export(model, tokenizer, "d2f", D2FParams(block_size=16), tmp_path / "m")
    export(model, tokenizer, "d2f", D2FParams(block_size=8), tmp_path / "m")  # replaces
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["architectures"] == ["DreamModel"] and written["model_type"] == "Dream"
    assert written["mask_token_id"] == tokenizer.mask_token_id
    assert written["d2f"]["block_size"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="use one of"):
        export(model, tokenizer, "llada", D2FParams(), tmp_path / "n")


def test_predict_is_shifted_logits(config):
    model = randomised(config)
    ids = torch.randint(0, config.vocab_size, (2, 7))
    chosen = torch.tensor([[0, 0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        logits, got = model(ids, causal_bias(7)), model.predict(ids, causal_bias(7), chosen)
    expected = torch.stack([logits[0, 1], logits[0, 4], logits[0, 5], logits[1, 0]])
    torch.testing.assert_close(got, expected)


class Toy(torch.nn.Module):
    """Named like a language model, so that Muon and AdamW both have parameters."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 5)])})
        self.head = torch.nn.Linear(5, 1)


def toy(stop_after, directory):
    torch.manual_seed(4)
    model = Toy()

    def loss_of_step(step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        y = model.head(model.model["layers"][0](x))
        return (y - x.sum(1, keepdim=True)).square().mean()

    fit(model, loss_of_step, FIT, directory, stop_after=stop_after)
    return model


def test_resumed_loop_gives_identical_weights(tmp_path):
    whole = toy(None, tmp_path / "whole")
    toy(3, tmp_path / "parts")
    parts = toy(None, tmp_path / "parts")
    for expected, got in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_resumed_trainings_give_identical_weights(tmp_path, tokenizer, config, monkeypatch):
    """All three trainings, with Muon's state, data and noise."""
    from training import stages

    def chain(directory):
        ar = train_ar(RECIPE, config, tokenizer, directory / "ar")
        teacher = train_teacher(RECIPE, ar, tokenizer, directory / "teacher")
        return train_student(RECIPE, teacher, tokenizer, directory / "student")

    whole = chain(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", lambda *args: fit(*args, stop_after=3))
        train_ar(RECIPE, config, tokenizer, tmp_path / "parts" / "ar")
    ar = train_ar(RECIPE, config, tokenizer, tmp_path / "parts" / "ar")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", lambda *args: fit(*args, stop_after=2))
        train_teacher(RECIPE, ar, tokenizer, tmp_path / "parts" / "teacher")
    parts = chain(tmp_path / "parts")
    for (name, expected), got in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    toy(None, tmp_path)
    with pytest.raises(ValueError, match="use another --out"):
        fit(Toy(), None, FitConfig(steps=7), tmp_path)


def test_smoke_chain(tmp_path):
    stages = ("ar", "teacher", "student", "export", "evaluate")
    run(tmp_path, stages, smoke=True, results=tmp_path / "results")
    report = json.loads((tmp_path / "results.json").read_text())
    assert set(report["trainings"]) == {"ar", "dream", "d2f"}
    assert report["figures"]["d2f-tiny, reference decoding"]["problems"] == 2
    assert "| d2f-tiny, reference decoding |" in (tmp_path / "results.md").read_text()


def test_missing_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage ar first"):
        run(tmp_path, ("teacher",), smoke=True, results=None)


def test_demo_problems_cover_all_step_counts():
    demo = demo_problems()
    assert len(demo) == 16
    assert {problem["answer"].count("=") for problem in demo} == {2, 3, 4, 5, 6}
