# SPDX-License-Identifier: Apache-2.0
"""Bases with an autoregressive head: Llama, Qwen2 and Qwen3 become D2F models."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from training import chat
from training.config import ConfigError, make_config, merged
from training.model import AUTOREGRESSIVE, MODELS, adapter_state, as_teacher, open_base
from training.tokenizer import build_tokenizer
from training.train import train
from training.trainer import set_up

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
STAGE = {
    "steps": 4,
    "batch_size": 2,
    "save_every": 2,
    "log_every": 1,
    "evaluate_every": 4,
    "evaluate": 1,
    "lora": {"r": 4, "alpha": 4, "dropout": 0.1, "targets": ["q_proj", "down_proj"]},
    "optimizer": {"lr": 1e-2},
}
LOSS = {"block_size": 4, "prompt_attention": "block_causal", "windows": 2, "window_blocks": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def base(folder, family):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = CONFIGS[family](
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
        tie_word_embeddings=family != "qwen2", bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    MODELS[family](config).save_pretrained(folder)
    return folder


def chain(tmp_path, family="llama", **changes):
    folder = tmp_path / "base"
    if not folder.exists():
        base(folder, family)
        lines = [{"prompt": f"Tom has {n} apples", "response": f"{n}+1={n + 1}"} for n in range(9)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    source = str(tmp_path / "data.jsonl")
    values = {
        "name": "chain",
        "model": {"base": str(folder), "family": family},
        "data": {"source": source, "validation": source, "max_length": 64, "multiple": 8,
                 "group_by_length": True},
        "decoding": {"block_size": 4, "max_blocks": 2, "max_tokens": 8},
        "stages": {
            "twin": {"objective": "next_token", "export": "twin", **STAGE},
            "student": {"objective": "d2f", "start": "twin", "export": "student", **STAGE,
                        "loss": {**LOSS, "teacher": "next_token"}},
        },
    }  # fmt: skip
    return make_config(merged(values, changes))


def exported(out, name):
    return load_file(out / "models" / name / "model.safetensors")


@pytest.mark.parametrize("family", AUTOREGRESSIVE)
def test_a_chain_of_adapters_resumes_exactly_and_exports(tmp_path, family):
    config = chain(tmp_path, family)
    train(config, tmp_path / "whole")
    for stage in config.stages:
        train(config, tmp_path / "parts", (stage,), stop_after=3)
        train(config, tmp_path / "parts", (stage,))
    before = load_file(tmp_path / "base" / "model.safetensors")
    for name in ("twin", "student"):
        ours, theirs = exported(tmp_path / "parts", name), exported(tmp_path / "whole", name)
        assert ours.keys() == theirs.keys() == before.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    embed = "model.embed_tokens.weight"
    mask = AutoTokenizer.from_pretrained(tmp_path / "base").mask_token_id
    differs = (theirs[embed] != before[embed]).any(1).nonzero().tolist()
    assert differs == [[mask]], "of the embedding, the mask's row alone is trained"
    assert torch.equal(exported(tmp_path / "whole", "twin")[embed], before[embed])

    # The twin is a stock checkpoint; the student says what it is.
    own = json.loads((tmp_path / "whole" / "models" / "twin" / "config.json").read_text())
    assert own["model_type"] == family and "d2f" not in own
    values = json.loads((tmp_path / "whole" / "models" / "student" / "config.json").read_text())
    stack = family.capitalize()
    assert values["architectures"] == [f"D2F{stack}ForCausalLM"]
    assert values["model_type"] == f"d2f_{family}"
    assert values["mask_token_id"] == mask
    assert values["d2f"]["prompt_attention"] == "block_causal"
    assert values["d2f"]["block_size"] == 4
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "models" / "twin")
    run = set_up(config, "twin", tmp_path / "whole", Accelerator(), "eager")
    run.predictor.eval()
    ids = torch.arange(5, 15)[None]
    causal = torch.ones(10, 10, dtype=torch.bool).tril()[None]
    chosen = torch.arange(10)[None] > 0
    with torch.no_grad():
        logits = run.predictor(ids, torch.arange(10)[None], causal, chosen)
        torch.testing.assert_close(logits, twin(ids).logits[0, :-1], rtol=1e-4, atol=1e-5)


def test_the_teachers_adapter_is_lent_and_returned(tmp_path):
    config = chain(tmp_path)
    train(config, tmp_path / "out", ("twin",))
    run = set_up(config, "student", tmp_path / "out", Accelerator(), "eager")
    twin = load_file(tmp_path / "out" / "twin" / "final.safetensors")
    student = adapter_state(run.predictor.net)
    assert run.adapter is not None and twin.keys() < student.keys()
    with torch.no_grad():
        for tensor in student.values():
            tensor.add_(1.0)
        kept = {name: tensor.clone() for name, tensor in student.items()}
        with as_teacher(run.predictor, run.adapter):
            inside = adapter_state(run.predictor.net)
            assert all(torch.equal(inside[name], twin[name]) for name in twin)
    assert all(torch.equal(student[name], kept[name]) for name in kept)

    # Under autocast each computes with its own weights, in whatever order.
    place = torch.arange(6)[None]
    given = (place + 5, place, torch.ones(1, 6, 6, dtype=torch.bool), place > 0)

    def teacher() -> torch.Tensor:
        with as_teacher(run.predictor, run.adapter), torch.no_grad():
            return run.predictor(*given)

    run.predictor.eval()
    alone = []
    for one in (teacher, lambda: run.predictor(*given)):
        with torch.autocast("cpu", torch.bfloat16):
            alone.append(one().detach())
    with torch.autocast("cpu", torch.bfloat16):
        both = (teacher(), run.predictor(*given))
    assert not torch.equal(*alone)
    assert all(torch.equal(x, y) for x, y in zip(both, alone, strict=True))


def test_the_twins_greedy_answers_are_the_data(tmp_path):
    changes = {"lora": None, "evaluate": 0}
    muon = {"name": "muon", "lr": 1e-2}
    twin = {**changes, "steps": 60, "save_every": 60, "optimizer": muon}
    student = {**changes, "loss": {"teacher": "greedy"}}
    config = chain(tmp_path, stages={"twin": twin, "student": student})
    train(config, tmp_path / "out", ("twin",))
    run = set_up(config, "student", tmp_path / "out", Accelerator(), "eager")
    file = tmp_path / "out" / "student" / "answers.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(entries) == 9
    prompts = {f"Tom has {n} apples": n for n in range(9)}
    kept = {tuple(example.prompt): example.answer for example in run.source.all}
    for text, number in prompts.items():
        ids = torch.tensor([run.loaded.tokenizer(text).input_ids])
        (entry,) = [entry for entry in entries if entry["record"] == number]
        own = run.predictor.net.generate(ids, max_new_tokens=40, do_sample=False, use_cache=True)
        row = own[0, ids.shape[1] :].tolist()
        if entry["answer"] is None:
            assert run.ends[0] not in row[:30]
        else:
            assert entry["answer"] == row[: row.index(run.ends[0])]
            assert kept[tuple(ids[0].tolist())] == tuple(entry["answer"])
    # An interrupted run goes on behind the answers that are there.
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + '{"record": 3, "an')
    again = set_up(config, "student", tmp_path / "out", Accelerator(), "eager")
    assert [json.loads(line) for line in file.read_text().splitlines()] == entries
    assert again.source.all == run.source.all
    train(config, tmp_path / "out", ("student",))


def test_an_adapter_alone_is_one_that_peft_loads(tmp_path):
    from peft import PeftModel

    config = chain(tmp_path, stages={"student": {"merge": False}})
    train(config, tmp_path / "out")
    folder = tmp_path / "out" / "models" / "student"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(plain, folder).eval()
    run = set_up(config, "student", tmp_path / "out", Accelerator(), "eager")
    run.predictor.eval()
    ids = torch.tensor([[5, 6, run.loaded.mask_id, 7, run.loaded.mask_id, 9]])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None]
    with torch.no_grad():
        logits = run.predictor(ids, torch.arange(6)[None], causal, torch.arange(6)[None] > 0)
        theirs = loaded(ids).logits[0, :-1]
    other = torch.arange(theirs.shape[-1]) != run.loaded.mask_id  # never a proposal
    torch.testing.assert_close(logits[:, other], theirs[:, other], rtol=1e-4, atol=1e-5)


def test_an_adapter_alone_merges_into_the_model_that_training_had(tmp_path):
    from training.export import merged_state
    from vllm_d2f.hub.prepare import MergePlan, merge

    config = chain(tmp_path, stages={"student": {"merge": False}, "twin": {"merge": False}})
    train(config, tmp_path / "out")
    for stage, model_type in (("student", "d2f_llama"), ("twin", "llama")):
        adapter = str(tmp_path / "out" / "models" / stage)
        folder = merge(tmp_path / f"{stage}-merged", MergePlan(str(tmp_path / "base"), adapter))
        run = set_up(config, stage, tmp_path / "out", Accelerator(), "eager")
        want = merged_state(run.predictor.net)
        got = load_file(folder / "model.safetensors")
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-7)
        values = json.loads((folder / "config.json").read_text())
        assert values["model_type"] == model_type and ("d2f" in values) == (stage == "student")
        assert AutoTokenizer.from_pretrained(folder).mask_token_id == run.loaded.mask_id


def test_a_new_mask_token_gets_a_row(tmp_path):
    config = chain(tmp_path, model={"mask_token": "<|hole|>", "chat_template": "{{ 1 }}"})
    opened = open_base(config.model)
    rows = len(AutoTokenizer.from_pretrained(tmp_path / "base"))
    assert opened.mask_id == rows and opened.config.vocab_size == rows + 1
    assert opened.tokenizer.chat_template == "{{ 1 }}"
    train(config, tmp_path / "out")
    folder = tmp_path / "out" / "models" / "student"
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows + 1
    assert len(exported(tmp_path / "out", "student")["model.embed_tokens.weight"]) == rows + 1
    assert AutoTokenizer.from_pretrained(folder).mask_token_id == rows


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="student.start: 'twin' trains an adapter"):
        chain(tmp_path, stages={"student": {"lora": {"r": 8}}})
    for changes, words in (
        ({"teacher": "bidirectional"}, "windows: a bidirectional teacher sees whole sequences"),
        ({"teacher": "data", "kl": "reverse"}, "kl: without effect with teacher: data"),
        ({"teacher_input": "fresh"}, "teacher_input: fresh is without effect"),
    ):
        with pytest.raises(ConfigError, match=words):
            chain(tmp_path, stages={"student": {"loss": changes}})
    with pytest.raises(ConfigError, match="loss.windows: need data.packing: false"):
        chain(tmp_path, data={"packing": True})


def test_a_chat_model_answers_questions(tmp_path):
    """Prompts that do not end are left out; answers are the model's greedy ones, cut or not."""
    folder = base(tmp_path / "base", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}Q{{ m['content'] }}A{% endfor %}"
    tokenizer.save_pretrained(folder)
    questions = ["Tom has 3 apples", "Ann has 12 pens and finds 4"]
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question": q}) + "\n" for q in questions)
    )
    out = tmp_path / "chat.jsonl"
    chat.main(
        ["--base", str(folder), "--out", str(out), "--prompts", "3", "--max-tokens", "5"]
        + ["--questions", str(tmp_path / "q.jsonl")]
    )
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["prompt"] for one in found][-2:] == questions
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for one in found[-2:]:
        ids = tokenizer(f"Q{one['prompt']}A", return_tensors="pt", add_special_tokens=False)
        text_T = net.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert one["response"] == tokenizer.decode(text_T).split(tokenizer.eos_token)[0]
