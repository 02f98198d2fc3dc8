# SPDX-License-Identifier: Apache-2.0
"""Train the embedded tiny models: `python -m training.tiny --out DIR`.

Runs the stages ar, teacher, student, export and evaluate. Running the command again goes on where
it stopped; finished stages are loaded. `--smoke` runs the whole chain on a toy scale in a minute.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from training.arithmetic import problems, worked_answer
from training.export import KINDS, card, export
from training.fit import FitConfig
from training.model import ModelConfig, TinyQwen2
from training.report import evaluate_models, summary, write_report
from training.stages import Recipe, train_ar, train_student, train_teacher
from training.tokenizer import build_tokenizer, padded_vocab_size
from vllm_d2f.d2f import D2FParams

STAGES = ("ar", "teacher", "student", "export", "evaluate")

SMOKE = Recipe(
    step_counts=(2, 3),
    ar=FitConfig(steps=4, batch_size=8, save_every=4),
    teacher=FitConfig(steps=4, batch_size=8, save_every=4),
    student=FitConfig(steps=4, batch_size=8, save_every=4),
    compile=False,
    watched=8,
)


def demo_problems(count: int = 16) -> list[dict[str, object]]:
    """Test problems for demos, all numbers of steps among them."""
    return [
        {"question": p.question, "answer": worked_answer(p.start, p.steps), "final": p.final}
        for p in problems("test", count, "demo")
    ]


def run(out: Path, stages: tuple[str, ...], smoke: bool, results: Path | None) -> None:
    """Train, export and evaluate under `out`; checkpoints go to `out`, models to `out/models`."""
    recipe = SMOKE if smoke else Recipe()
    tokenizer = build_tokenizer()
    config = ModelConfig(padded_vocab_size(tokenizer))
    if smoke:
        config = replace(config, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    params = D2FParams(block_size=recipe.block_size)
    directories = {"ar": out / "ar", "dream": out / "teacher", "d2f": out / "student"}
    if "ar" in stages:
        train_ar(recipe, config, tokenizer, directories["ar"])
    if "teacher" in stages:
        ar = load(config, directories["ar"])
        train_teacher(recipe, ar, tokenizer, directories["dream"])
    if "student" in stages:
        teacher = load(config, directories["dream"])
        train_student(recipe, teacher, tokenizer, directories["d2f"])
    if "export" in stages:
        for kind, directory in directories.items():
            if (directory / "checkpoint.pt").exists():
                model = load(config, directory)
                export(model, tokenizer, kind, params, out / "models" / f"{kind}-tiny")
        demo = json.dumps(demo_problems(), indent=1) + "\n"
        (out / "models" / "problems.json").write_text(demo)
    if "evaluate" in stages:
        began = time.monotonic()
        count = 2 if smoke else 500
        held_out = problems("test", count, "evaluation", recipe.step_counts)
        figures = evaluate_models(out / "models", held_out, params, others=not smoke)
        path = results or out / "tiny_training"
        write_report(path, recipe, figures, directories, time.monotonic() - began)
        for kind in KINDS:
            readme = out / "models" / f"{kind}-tiny" / "README.md"
            readme.write_text(card(kind, summary(kind, figures)))


def load(config: ModelConfig, directory: Path) -> TinyQwen2:
    """The model of a finished or running stage."""
    checkpoint = directory / "checkpoint.pt"
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint} is missing; run the stage {directory.name} first")
    model = TinyQwen2(config)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of checkpoints")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of the stages, by commas")
    parser.add_argument("--smoke", action="store_true", help="the chain on a toy scale")
    parser.add_argument("--results", type=Path, help="where the report goes, without suffix")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    stages = tuple(args.stages.split(","))
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; use some of {', '.join(STAGES)}")
    torch.set_num_threads(args.threads)
    run(args.out, stages, args.smoke, args.results)


if __name__ == "__main__":
    main()
