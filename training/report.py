# SPDX-License-Identifier: Apache-2.0
"""Evaluate the exported models on held-out problems and write the result files."""

import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from training import evaluate, evaluate_d2f
from training.arithmetic import Problem
from training.model import ModelConfig, TinyQwen2
from training.stages import Recipe
from vllm_d2f.d2f import D2FParams

Figures = dict[str, dict[str, float]]


def load_exported(directory: Path) -> TinyQwen2:
    """An exported checkpoint as the compact model."""
    values = json.loads((directory / "config.json").read_text())
    names = ModelConfig.__dataclass_fields__
    model = TinyQwen2(ModelConfig(**{name: values[name] for name in names}))
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval()


def load_in_transformers(directory: Path) -> Qwen2ForCausalLM:
    """An exported checkpoint in transformers; Dream's layout is Qwen2's under another name."""
    values = json.loads((directory / "config.json").read_text())
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "d2f")}
    config = Qwen2Config(**values)
    model = Qwen2ForCausalLM(config)
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval()


def evaluate_models(
    models: Path, problems: list[Problem], params: D2FParams, others: bool = True
) -> Figures:
    """Scores of the three models under their own ways of decoding, and of a few `others`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models / "d2f-tiny")
    ar, dream, d2f = (load_exported(models / f"{kind}-tiny") for kind in ("ar", "dream", "d2f"))
    figures: Figures = {}

    def note(name: str, run, *args) -> None:
        began = time.monotonic()
        result = run(*args)
        figures[name] = result.as_dict() | {"seconds": round(time.monotonic() - began, 1)}

    note("ar-tiny, greedy", evaluate.autoregressive, ar, problems, tokenizer)
    note("dream-tiny, one token per step", evaluate.one_token_per_step, dream, problems, tokenizer)
    in_transformers = load_in_transformers(models / "d2f-tiny")
    by_reference = (in_transformers, problems, tokenizer, params)
    note("d2f-tiny, reference decoding", evaluate_d2f.by_reference, *by_reference)
    if not others:
        return figures
    note("dream-tiny, D2F decoding", evaluate_d2f.batched, dream, problems, tokenizer, params)
    for tau in (0.5, 0.7, 0.8, 0.95, 0.99):
        other = replace(params, tau_conf=tau)
        name = f"d2f-tiny, tau_conf {tau}"
        note(name, evaluate_d2f.batched, d2f, problems, tokenizer, other)
    single = replace(params, max_blocks=1)
    note("d2f-tiny, one block at a time", evaluate_d2f.batched, d2f, problems, tokenizer, single)
    return figures


def summary(kind: str, figures: Figures) -> str:
    """A sentence for the model card, from the model's own way of decoding."""
    name, figure = next((n, f) for n, f in figures.items() if n.startswith(f"{kind}-tiny"))
    decoding = name.removeprefix(f"{kind}-tiny, ")
    return (
        f"On {figure['problems']:.0f} held-out problems ({decoding}): "
        f"{100 * figure['final']:.1f} % right, "
        f"{figure['tokens_per_forward']:.2f} tokens per forward.\n\n"
    )


def training_summary(directory: Path) -> list[dict[str, float]]:
    """Some ten lines of a training's log, the last one among them."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    stride = max(len(lines) // 10, 1)
    return [*lines[stride - 1 : -1 : stride], lines[-1]]


def write_report(
    path: Path, recipe: Recipe, figures: Figures, trainings: dict[str, Path], seconds: float
) -> None:
    """`path`.json and `path`.md."""
    logs = {kind: training_summary(directory) for kind, directory in trainings.items()}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
    }
    report = {
        "command": "python -m training.tiny --out DIR",
        "machine": f"{os.cpu_count()}-core CPU ({platform.machine()}), one thread",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "recipe": asdict(recipe),
        "figures": figures,
        "evaluation_seconds": round(seconds, 1),
        "trainings": logs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    count = next(iter(figures.values()))["problems"]
    rows = [
        f"| {name} | {100 * f['exact']:.1f} % | {100 * f['final']:.1f} % "
        f"| {f['tokens_per_forward']:.2f} |"
        for name, f in figures.items()
    ]
    stages = [
        f"| {kind} | {log[-1]['sequences']:.0f} | {log[-1]['seconds'] / 60:.1f} min "
        f"| {log[-1]['loss']:.4f} |"
        for kind, log in logs.items()
    ]
    made = f"Made by `{report['command']}` on a {report['machine']}"
    text = f"""\
# The embedded tiny models

{made}; {_versions(versions)}.
The {count:.0f} problems are from the test split: none has the start and the operations of a
training problem (single additions of course occur in both).
*Exact* asks for the whole worked answer and its end token, *final* for the last number. Tokens per
forward count the answer up to its end token; the teacher also decides the tail behind it.

| model and decoding | exact | final | tokens per forward |
|---|---|---|---|
{_lines(rows)}

D2F decoding has block size {recipe.block_size}, 4 blocks, tau_add 0.1, tau_act 0.95 and tau_conf
0.9 where not said otherwise.

| training | sequences | time | last loss |
|---|---|---|---|
{_lines(stages)}

Tokens per forward are far above those of published D2F models (2 to 3): a running total depends on
the question alone, and four layers can work out a block of it at once. The model is for tests and
demos, not a measurement of the method. The row "dream-tiny, D2F decoding" is the teacher decoded
under the block-causal mask without distillation: it is what the distillation starts from.

The loss of ar and dream is cross-entropy per answer token, that of d2f the KL divergence from the
teacher per masked token.
"""
    path.with_suffix(".md").write_text(text)


def _lines(rows: list[str]) -> str:
    return "\n".join(rows)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
