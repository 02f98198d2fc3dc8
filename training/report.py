# SPDX-License-Identifier: Apache-2.0
"""The documents of a run: model cards, `report.json`, `report.md` and `report.png`."""

import contextlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers

from training.config import Config, StageSection
from training.export import KINDS

DECODED = {
    "next_token": "greedy",
    "diffusion": "one token per step",
    "d2f": "reference decoding",
}


def card(config: Config, name: str, figures: str = "") -> str:
    """Return a short model card, generated from the run."""
    stage = config.stages[name]
    # A base has a licence of its own; a folder or name of this machine is no name for it.
    own = config.model.base
    about = "license: apache-2.0\n" if own is None else ""
    if own is not None and "/" in own and not Path(own).is_dir():
        about = f"base_model: {own}\n"
    lines = [
        f"---\n{about}pipeline_tag: text-generation\n---\n# {stage.export}\n",
        (
            f"{KINDS[stage.objective]} Trained with vllm-d2f (`training/`), config "
            f"`{config.name}`, stage `{name}`: {stage.steps} updates of "
            f"{stage.batch_size * stage.accumulate} sequences{_lora(stage)}.\n"
        ),
    ]
    if config.data.source == "arithmetic":
        lines.append(
            "It solves arithmetic word problems like *Tom has 34 apples, buys 25 more, gives 18 "
            "away. How many apples does Tom have?* with the worked answer *34+25=59-18=41*: "
            "numbers and running totals between 10 and 99, sentences as `training/arithmetic.py` "
            "makes them. It knows nothing else; it exists for tests and demos.\n"
        )
    if stage.objective == "d2f":
        lines.append(
            "Serve it with `pip install vllm-d2f` and `vllm serve FOLDER`; how it decodes stands "
            "in the `d2f` section of `config.json`.\n"
        )
    if figures:
        lines.append(figures + "\n")
    return "\n".join(lines)


def _lora(stage: StageSection) -> str:
    return f", LoRA of rank {stage.lora.r}" if stage.lora else ""


def summary(stage: StageSection, figures: dict[str, float]) -> str:
    """Return a sentence for the model card."""
    return (
        f"On {figures['problems']:.0f} held-out problems ({DECODED[stage.objective]}): "
        f"{100 * figures['exact']:.1f} % of the answers right to the last token, "
        f"{figures['tokens_per_forward']:.2f} tokens per forward."
    )


def versions() -> dict[str, str]:
    modules = (torch, transformers, accelerate, peft)
    return {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()}


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{os.cpu_count()}-core CPU ({platform.machine()}), {threads} thread(s)"


def read_log(directory: Path) -> list[dict[str, float]]:
    return read_lines(directory / "log.jsonl")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a JSONL file, without a last one that was cut off."""
    entries = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def write_report(
    config: Config,
    out: Path,
    figures: dict[str, dict[str, float]],
    seconds: float,
    command: str = "",
) -> None:
    """Write `OUT/report.json`, `.md` and `.png`.

    Args:
        seconds: how long the evaluation took.
        command: what was run.
    """
    begun = [name for name in config.stages if (out / name / "log.jsonl").exists()]
    logs = {name: log for name in begun if (log := read_log(out / name))}
    report: dict[str, Any] = {
        "command": command,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "figures": {config.stages[name].export: value for name, value in figures.items()},
        "decoding": {
            config.stages[name].export: DECODED[config.stages[name].objective] for name in figures
        },
        "training_minutes": {name: round(log[-1]["seconds"] / 60, 1) for name, log in logs.items()},
        "evaluation_seconds": round(seconds, 1),
        "config": config.model_dump(mode="json"),
        "logs": {name: _some(log) for name, log in logs.items()},
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(_markdown(report, config, logs))
    plot(logs, out / "report.png")


def _some(log: list[dict[str, float]], count: int = 12) -> list[dict[str, float]]:
    """Return some lines of a log, including those with scores and the last one."""
    stride = max(len(log) // count, 1)
    return [e for i, e in enumerate(log) if i % stride == stride - 1 or "exact" in e]


def _markdown(report: dict[str, Any], config: Config, logs: dict[str, list[dict]]) -> str:
    rows = [
        f"| {name}, {report['decoding'][name]} | {100 * f['exact']:.1f} % | "
        f"{100 * f['final']:.1f} % | {f['tokens_per_forward']:.2f} |"
        for name, f in report["figures"].items()
    ]
    stages = [
        f"| {name} | {config.stages[name].objective} | {log[-1]['sequences']:.0f} | "
        f"{log[-1]['seconds'] / 60:.1f} min | {log[-1]['loss_content']:.4f} |"
        for name, log in logs.items()
    ]
    problems = next((f["problems"] for f in report["figures"].values()), 0)
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            f"# Training report: {config.name}\n",
            f"`{report['command']}`, {report['machine']}, {report['date']}, {made}.\n",
            f"{problems:.0f} held-out problems; tokens per forward count up to the end token.\n",
            "| model | exact match | last number right | tokens per forward |",
            "|---|---|---|---|",
            *rows,
            "",
            "| stage | objective | sequences | time | last loss (answer positions) |",
            "|---|---|---|---|---|",
            *stages,
            "",
            "![loss and score](report.png)",
            "",
        ]
    )


def plot(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the loss above, exact match below, one column per stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, max(len(logs), 1), figsize=(3.2 * max(len(logs), 1), 4.6), squeeze=False, sharex="col"
    )
    for column, (name, log) in enumerate(logs.items()):
        above, below = axes[0, column], axes[1, column]
        steps = [e["sequences"] for e in log]
        above.plot(steps, [e["loss_content"] for e in log], label="answer")
        if any(e["loss_tail"] for e in log):
            above.plot(steps, [max(e["loss_tail"], 1e-6) for e in log], label="end tokens", lw=0.8)
        above.set(title=name, yscale="log")
        above.legend(frameon=False, fontsize=8)
        scored = [e for e in log if "exact" in e]
        at = [e["sequences"] for e in scored]
        below.plot(at, [100 * e["exact"] for e in scored], "o-", ms=3)
        below.set(ylim=(0, 102), xlabel="sequences")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("exact match, %")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
