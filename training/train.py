# SPDX-License-Identifier: Apache-2.0
"""Train D2F models: `python -m training.train --config training/configs/tiny.yaml --out DIR`.

A config names one or more stages, each with an objective: `next_token`, `diffusion` or `d2f`.
Running the command again continues where it stopped, to the same weights; finished stages are
loaded. On several devices start it with `accelerate launch -m training.train ...`.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from training.arithmetic import problems
from training.attention import chosen_attention
from training.config import Config, ConfigError, load_config
from training.data import Example, check_source, encode_problems, validation
from training.export import export, save_weights
from training.model import open_base
from training.report import card, read_log, summary, write_report
from training.trainer import (
    Data,
    Run,
    data_of,
    decoded,
    fit,
    same_settings,
    set_up,
    take_whole,
)
from vllm_d2f.cpu import emulates
from vllm_d2f.output import check_output, disk_is_full, ends_with_its_pipe, write_at_once


def train(
    config: Config,
    out: Path,
    stages: tuple[str, ...] | None = None,
    attention: str | None = None,
    stop_after: int | None = None,
) -> None:
    """Train the stages of `config` that are not finished yet, in order.

    Args:
        stages: some of them only.
        stop_after: leave each stage after this many updates, as an interruption would (for tests).
    """
    check_trackers(config)
    chosen = []
    for name in stages or config.stages:
        exported(config, name, out)
        if (out / name / "done.json").exists():
            same_settings(out / name, config, name)
        else:
            check_source(data_of(config, name))
            check_output(out / name, "settings.json", text="")
            chosen.append(name)
    accelerator = Accelerator(log_with=list(config.trackers) or None, project_dir=str(out))
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise RuntimeError(
            "DeepSpeed gives no access to gradients, which an update here divides by a sum over "
            "all forwards; shard with --config_file training/configs/accelerate-fsdp.yaml"
        )
    for name in chosen:
        if config.stages[name].precision == "bfloat16" and accelerator.device.type == "cpu":
            warn_of_slow_precision(name)
    attention = chosen_attention(attention or config.model.attention, accelerator.device)
    base = open_base(config.model)
    config.check_positions(base.config.max_position_embeddings)
    data = {name: Data.read(config, name, base) for name in chosen}
    if config.trackers:
        accelerator.init_trackers(config.name, flat(config.model_dump(mode="json")))
    for name in chosen:
        run = set_up(config, name, out, accelerator, attention, data[name])
        fit(run, stop_after)
        if stop_after is None:
            finish(run, out)
        accelerator.free_memory()
    if config.trackers:
        accelerator.end_training()


def warn_of_slow_precision(stage: str) -> None:
    """Name the faster settings where the processor has no instructions for bfloat16."""
    if emulates(torch.bfloat16):
        print(
            f"stage {stage}: this processor has no instructions for bfloat16, so that training "
            "takes several times as long as in float32: give "
            f"model.dtype=float32 stages.{stage}.precision=float32",
            file=sys.stderr,
        )


def check_trackers(config: Config) -> None:
    """Refuse a tracker that is not installed, rather than train without it.

    Raises:
        ConfigError: naming the package.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"trackers: {name} is not installed; pip install {name}")


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings under dotted names, as trackers take them."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{before}{key}.")
        else:
            plain = isinstance(value, int | float | str | bool)
            result[before + key] = value if plain else str(value)
    return result


def finish(run: Run, out: Path) -> None:
    """Write the stage's weights, its exported folder, and the mark that it is done."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        state = run.accelerator.get_state_dict(run.model)  # all processes take part
        if run.accelerator.is_main_process:
            take_whole(run, state)
    if run.accelerator.is_main_process:
        save_weights(run.predictor.net, run.directory / "final.safetensors")
        export_stage(run, out)
        last = json.dumps(read_log(run.directory)[-1])
        write_at_once(run.directory / "done.json", last + "\n")
    run.accelerator.wait_for_everyone()


def exported(config: Config, name: str, out: Path) -> Path | None:
    """Return the folder that the stage's model is written to, if any; it may hold an earlier one.

    Raises:
        OutputError: something else is there. The card of an export says that it is one.
    """
    if (export_to := config.stages[name].export) is None:
        return None
    check_output(out / "models" / export_to, "README.md", "Trained with vllm-d2f")
    return out / "models" / export_to


def export_stage(run: Run, out: Path, figures: str = "") -> None:
    """Write `OUT/models/NAME`, if the stage has a name for it."""
    config = run.config
    if (folder := exported(config, run.name, out)) is None:
        return
    text = card(config, run.name, figures)
    export(
        run.loaded, run.predictor.net, run.stage, config.decoding, folder, text, config.model.base
    )


def final_evaluation(
    config: Config, out: Path, attention: str | None = None, command: str = ""
) -> dict[str, Any]:
    """Decode held-out problems with every exported model, and write the report, in one process."""

    accelerator = Accelerator()
    if not accelerator.is_main_process:
        return {}
    attention = chosen_attention(attention or config.model.attention, accelerator.device)
    figures: dict[str, Any] = {}
    began = time.monotonic()
    for name, stage in config.stages.items():
        if stage.export is None or not config.final.problems:
            continue
        run = set_up(config, name, out, accelerator, attention)
        run.predictor.to(accelerator.device)
        examples = held_out_problems(config, run)
        figures[name] = decoded(run, examples, config.final.canvas).as_dict()
        export_stage(run, out, summary(stage, figures[name]))
    write_report(config, out, figures, time.monotonic() - began, command)
    return figures


def held_out_problems(config: Config, run: Run) -> list[Example]:
    """Return arithmetic problems of the test split, or those that `data.validation` names."""
    data, count = config.data, config.final.problems
    if data.source != "arithmetic":
        return validation(data, run.loaded.tokenizer, run.stage.loss.block_size, count)
    items = problems("test", count, "evaluation", data.step_counts)
    return encode_problems(items, run.loaded.tokenizer)


@ends_with_its_pipe()
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file, see training/configs"
    )
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--out", type=Path, default=None, help="default: build/NAME")
    parser.add_argument("--variant", help="a section under `variants` of the file")
    parser.add_argument("--smoke", action="store_true", help="the same as --variant smoke")
    parser.add_argument("--stages", help="names of stages, separated by commas")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--print-config", action="store_true", help="print the config and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="sizes, LoRA targets and memory, without weights"
    )
    args = parser.parse_intermixed_args(argv)  # overrides may stand anywhere
    out: Path = args.out or Path("build")
    try:
        config = load_config(args.config, args.overrides, "smoke" if args.smoke else args.variant)
        stages = tuple(args.stages.split(",")) if args.stages else None
        if unknown := set(stages or ()) - set(config.stages):
            raise ConfigError(
                f"--stages: unknown {sorted(unknown)}; there are {list(config.stages)}"
            )
        if args.print_config:
            print(json.dumps(config.model_dump(mode="json"), indent=1))
            return
        if args.dry_run:
            from training.estimate import dry_run

            print(dry_run(config))
            return
        variant = "smoke" if args.smoke else args.variant
        given = [*(["--variant", variant] if variant else []), *args.overrides]
        if args.threads:
            torch.set_num_threads(args.threads)
        out = args.out or out / config.name
        if stages is None and out.exists():
            report = out / "report.json"
            beside = (report.with_suffix(".md"), report.with_suffix(".png"))
            check_output(report, text='"training_minutes"', beside=beside)
        train(config, out, stages)
        if stages is None:
            command = f"python -m training.train --config {args.config} {' '.join(given)}".strip()
            final_evaluation(config, out, command=command)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        if disk_is_full(error):
            error = OSError(
                f"{out}: the disk is full ({error}). What was saved before is whole: free some "
                "space and run the same command again, which goes on from there"
            )
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
