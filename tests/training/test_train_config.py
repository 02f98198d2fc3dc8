# SPDX-License-Identifier: Apache-2.0
"""Configs: what ships is valid, and a bad value is named before anything is loaded."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from training.config import ConfigError, load_config, merged, parse_override
from training.estimate import dry_run, estimate
from training.experiments import load_plan
from training.train import main
from vllm_d2f.hub.names import resolve_embedded

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
TINY = CONFIGS / "tiny.yaml"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("tiny", None),
        ("tiny", "smoke"),
        *((n, v) for n in ("dream-7b", "llada-8b") for v in (None, "authors", "recommended")),
    ],
)
def test_shipped_configs_are_valid(name, variant):
    config = load_config(CONFIGS / f"{name}.yaml", variant=variant)
    assert config.stages


def test_the_prompts_of_the_longer_training_differ_in_nothing_else():
    plan = load_plan(CONFIGS / "prompt_attention.yaml")
    default, causal = (plan.of(name, 1).stages["student"] for name in plan.variants)
    assert causal.loss.prompt_attention == "block_causal"
    again = causal.loss.model_copy(update={"prompt_attention": "bidirectional"})
    assert causal.model_copy(update={"loss": again}) == default


def test_experiments_are_valid_and_differ_from_the_default():
    plan = load_plan(CONFIGS / "experiments.yaml")
    default = plan.of("default", 1)
    for name in plan.variants:
        assert name == "default" or plan.of(name, 1) != default
    assert len(plan.seeds) >= 3
    grouped = {v for group in plan.groups.values() for v in group["variants"]}
    assert grouped == set(plan.variants)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.student.loss.kl=sideways", "stages.student.loss.kl: Input should be 'forward'"),
        ("stages.student.optimizer.lr=-1", "stages.student.optimizer.lr"),
        ("stages.student.optimiser.lr=1", "stages.student.optimiser: Extra inputs"),
        ("stages.student.start=nobody", "no earlier stage"),
        ("data.max_length=4096", "max_position_embeddings 512"),
        ("data.extra_blocks=3", "data.extra_blocks"),
        ("stages.ar.steps=0", "stages.ar.steps"),
        ("model.sizes=null", "give base"),
        ("decoding.tau_conf=1.5", "decoding.tau_conf"),
        ("stages.student.lora={r: 4}", "use adamw with lora"),
        ("stages.student.loss.block_size", "section.field=value"),
        ("data.extra_blocks=[1", "not YAML"),
        ("data.extra_blocks=[0, 0]", "data.extra_blocks: one of the weights"),
        ("data.step_counts=[]", "data.step_counts"),
        ("data.validation=held.jsonl", "data.validation: without effect with source: arithmetic"),
        ("data.chat_template=true", "data.chat_template: without effect"),
        ("data={source: a.jsonl, step_counts: [2]}", "data.step_counts: without effect"),
        ("data={source: a.jsonl, validation: test}", "data.validation: 'test' must be a JSONL"),
        ("data.source=a.jsonl", "final.problems: needs data.validation"),
        ("stages.ar.loss.kl=reverse", "stages.ar.kl: without effect with objective: next_token"),
        ("stages.student.loss.pattern=uniform", "stages.student.pattern: without effect"),
        ("stages.student.merge=false", "stages.student.merge: without effect without lora"),
        ("stages.ar.optimizer.betas=[1, 2]", "stages.ar.optimizer.betas"),
        ("model.sizes.hidden_size=130", "model.sizes.hidden_size 130 is no multiple of num_att"),
        ("trackers=[mlflow]", "trackers.0"),
        ("stages.ar.export=/data/models", r"stages.ar.export: .*got '/data/models'"),
        ("stages.ar.export=../x", r"stages.ar.export: .*got '../x'"),
        ("stages.ar.export=.checkpoint", r"stages.ar.export: .*got '.checkpoint'"),
        ("stages.ar.export=d2f-tiny", "stages.student.export: 'ar' has the same"),
        ("stages={models: {objective: next_token, steps: 1}}", "stages.models: .* folder of exp"),
        (
            "stages.student.loss={block_size: 8, prompt_attention: block_causal}",
            "in blocks of decoding.block_size 16; make loss.block_size 8 the same",
        ),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, [override])


def test_command_line_says_it_in_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit, match="stages.ar.steps"):
        main(["--config", str(TINY), "--out", str(tmp_path), "stages.ar.steps=many"])
    with pytest.raises(SystemExit, match="no such config"):
        main(["--config", "nowhere.yaml"])
    with pytest.raises(SystemExit, match=r"unknown \['middle'\]"):
        main(["--config", str(TINY), "--stages", "middle"])
    with pytest.raises(SystemExit, match=r"data.source: .*missing.jsonl does not exist"):
        missing = ["data.source=missing.jsonl", "final.problems=0"]
        main(["--config", str(TINY), "--out", str(tmp_path / "x"), *missing])
    assert not (tmp_path / "x" / "ar").exists()
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        main(["--config", str(TINY), "--out", str(tmp_path / "y"), "model.attention=xformers"])


def test_variants(tmp_path):
    """An empty one changes nothing."""
    file = tmp_path / "c.yaml"
    for variants, message in (("{smoke: }", None), ("[smoke]", "map"), ("{smoke: 3}", "map")):
        file.write_text(f"{TINY.read_text().partition('variants:')[0]}\nvariants: {variants}\n")
        if message is None:
            assert load_config(file, variant="smoke") == load_config(file)
            continue
        with pytest.raises(ConfigError, match="variants: must map names to sections"):
            load_config(file, variant="smoke")
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="c.yaml: not UTF-8.*save it as UTF-8"):
        load_config(file)


def test_no_folder_of_the_users_is_replaced(tmp_path, monkeypatch):
    """It is found before anything is loaded."""

    def open_base(section):
        raise AssertionError("the base was opened")

    monkeypatch.setattr("training.train.open_base", open_base)
    for place in ("models/d2f-tiny/model.safetensors", "student/notes.txt", "report.md"):
        out = tmp_path / place.partition("/")[0]
        mine = out / place
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        with pytest.raises(SystemExit, match="exists, and vllm-d2f did not write it"):
            main(["--config", str(TINY), "--out", str(out)])
        assert [path for path in out.rglob("*") if path.is_file()] == [mine]
        assert mine.read_text() == "mine"


def test_scores_that_need_held_out_problems_ask_for_them():
    """Nothing to decode is no reason to decode nothing, where it was asked for."""
    with pytest.raises(ConfigError, match="stages.student.evaluate: needs data.validation"):
        load_config(CONFIGS / "dream-7b.yaml", ["stages.student.evaluate=20"])
    wanted = ["stages.student.evaluate=20", "data.validation=test"]
    assert load_config(CONFIGS / "dream-7b.yaml", wanted).data.held_out


def test_bad_data_is_found_before_anything_is_loaded(monkeypatch, tmp_path):
    def open_base(section):
        raise AssertionError("the base was opened")

    monkeypatch.setattr("training.train.open_base", open_base)
    for number, (content, message) in enumerate(
        (
            ('{"prompt": "a"}\n', r"record 1: field 'response' \(data.response\) is missing"),
            ("", "data.source: .* has no usable record; it is empty"),
            ('{"prompt": "a", "response": "b"}\n{oops', "line 2: not JSON"),
        )
    ):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(content)
        overrides = [f"data.source={file}", "final.problems=0", "stages.student.evaluate=0"]
        with pytest.raises(SystemExit, match=message):
            main(["--config", str(TINY), "--out", str(tmp_path / "out"), *overrides])
    assert not (tmp_path / "out").exists()


def test_authors_variants_are_what_the_published_code_does():
    """Not the paper's: schedule, direction, weight, length and rate; the same LoRA and AdamW."""
    for name, rate in (("dream-7b", 5e-6), ("llada-8b", 1e-5)):
        config = load_config(CONFIGS / f"{name}.yaml", variant="authors")
        stage = config.stages["student"]
        loss, optimizer, lora = stage.loss, stage.optimizer, stage.lora
        assert (loss.schedule, loss.full_tail) == ("monotone", 0)
        assert (loss.kl, loss.temperature, loss.data_weight) == ("forward", 1, 0)
        assert (loss.weight, loss.normalise, loss.tail_weight) == ("inverse_ratio", "tokens", 1)
        assert (loss.end_padding, loss.block_size) == ("all", 16)
        assert (loss.teacher_input, loss.prompt_attention) == ("same", "bidirectional")
        assert (optimizer.name, optimizer.lr, optimizer.schedule) == ("adamw", rate, "constant")
        assert (optimizer.betas, optimizer.weight_decay, optimizer.clip) == ((0.9, 0.95), 0.05, 1)
        assert (lora.r, lora.alpha, lora.dropout) == (32, 32, 0.1)
        output = "attn_out" if name == "llada-8b" else "o_proj"
        assert set(lora.targets) == {"q_proj", "k_proj", "v_proj", output}
        data = config.data
        assert (data.max_length, data.canvas, data.chat_template) == (1024, "max_length", True)
        assert data.answer_end == ("<|eot_id|>" if name == "llada-8b" else None)


def test_the_sharding_example_is_one_for_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / "accelerate-fsdp.yaml"))
    assert config.distributed_type.value == "FSDP" and config.num_processes == 8
    assert config.fsdp_config["fsdp_version"] == 2


def test_overrides_reach_the_config():
    config = load_config(TINY, ["stages.student.loss.schedule=monotone", "stages.ar.seed=7"])
    assert config.stages["student"].loss.schedule == "monotone"
    assert config.stages["ar"].seed == 7
    assert merged({"a": {"b": 1, "c": 2}}, parse_override("a.b=3")) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("name", "parameters", "trained"),
    [
        # Dream: 28 layers of rank 32 on q, k, v, o; LLaDA: 32 layers, all four of 4096 x 4096.
        (
            "dream-7b",
            7_615_616_512,
            28 * 32 * ((3584 + 3584) * 2 + (3584 + 512) * 2),
        ),
        ("llada-8b", 8_015_581_184, 32 * 32 * 4 * (4096 + 4096)),
    ],
)
def test_dry_run_knows_the_official_models(name, parameters, trained):
    config = load_config(CONFIGS / f"{name}.yaml")
    found = estimate(config, config.stages["student"])
    assert (found.parameters, found.trained) == (parameters, trained)
    assert set(found.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    # One copy of bf16 weights and adapters with AdamW must fit beside the rest into 80 GB.
    assert 2 * parameters < found.weights < 2.02 * parameters
    assert found.total < 80e9
    text = dry_run(config)
    assert f"{parameters:,}" in text and "GiB" in text


def test_a_bases_own_config_bounds_and_sizes_a_run(tmp_path, capsys):
    """Without `model.sizes`: `--dry-run` reads them, and longer sequences than positions end it."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "{name: t, model: {base: dream-tiny}, data: {max_length: 512}, "
        "stages: {student: {objective: d2f, steps: 1}}}"
    )
    main(["--config", str(file), "--dry-run"])
    weights = load_file(resolve_embedded("dream-tiny") / "model.safetensors")
    count = f"{sum(tensor.numel() for tensor in weights.values()):,}"
    assert f"parameters  {count}, trained {count}" in capsys.readouterr().out
    too_long = "data.max_length 513 is more than the model's max_position_embeddings 512"
    for more in (["--dry-run"], ["--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit, match=too_long):
            main(["--config", str(file), *more, "data.max_length=513"])
    assert not (tmp_path / "out").exists()


def test_dry_run_refuses_unknown_targets():
    config = load_config(
        CONFIGS / "dream-7b.yaml", ["stages.student.lora.targets=[q_proj, attn_uot]"]
    )
    with pytest.raises(ValueError, match="lora.targets: the model has no 'attn_uot'"):
        dry_run(config)


def test_every_acceptance_rule_may_be_exported():
    from typing import get_args

    from training.config import DecodingSection, StageSection
    from training.export import d2f_section
    from training.model import BY_NAME
    from vllm_d2f.settings import settings_from_dict
    from vllm_d2f.strategies import ACCEPT

    assert set(get_args(DecodingSection.model_fields["accept"].annotation)) == set(ACCEPT)
    stage = StageSection(objective="d2f", steps=1)
    for rule in ACCEPT:
        section = d2f_section("llama", stage, DecodingSection(accept=rule))
        assert settings_from_dict(section, family=BY_NAME["llama"]).params.accept == rule
