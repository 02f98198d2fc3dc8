# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which a training continues exactly.

Data and noise of a step are drawn from seeds made of its number, so weights, optimizers, the random
state (for dropout) and the number are everything. A checkpoint appears as a whole or not at all.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file

from vllm_d2f.hub.cache import sync

WEIGHTS = "model.safetensors"


def only_trained(accelerator: Accelerator) -> None:
    """Leave frozen weights, such as an adapter's base, out of checkpoints.

    For one process or DDP; FSDP and DeepSpeed have ways of their own.
    """
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        return

    def on_save(models: list[Any], weights: list[dict[str, Any]], directory: str) -> None:
        for at, model in enumerate(models):
            inner = accelerator.unwrap_model(model)
            trained = {name for name, p in inner.named_parameters() if p.requires_grad}
            names = {name: name.removeprefix("module.") for name in weights[at]}
            weights[at] = {new: weights[at][k] for k, new in names.items() if new in trained}

    def on_load(models: list[Any], directory: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        weights = load_file(Path(directory) / WEIGHTS)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if trained != set(weights):
            raise ValueError(f"{directory}: tensors differ from those that are trained")
        model.load_state_dict(weights, strict=False)

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


def save(accelerator: Accelerator, directory: Path, progress: dict[str, Any]) -> None:
    """Write `directory/checkpoint`, all processes together."""
    with whole_folder(directory / "checkpoint", accelerator) as part:
        accelerator.save_state(str(part))
        if accelerator.is_main_process:
            (part / "progress.json").write_text(json.dumps(progress))


@contextlib.contextmanager
def whole_folder(directory: Path, accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Yield an empty folder. It takes the place of `directory` once it is complete, or not at all.

    Args:
        accelerator: of processes that fill it together.
    """
    main = accelerator is None or accelerator.is_main_process
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    part, old = (directory.with_name(f".{directory.name}.{end}") for end in ("part", "old"))
    if main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait()
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # it may have filled the disk
        raise
    wait()
    if main:
        # The files are on the disk before the rename makes them count.
        for path in [*part.rglob("*"), part]:
            sync(path)
        if directory.exists():
            # The old one must not go before the new one counts.
            shutil.rmtree(old, ignore_errors=True)
            os.rename(directory, old)
        os.rename(part, directory)
        shutil.rmtree(old, ignore_errors=True)
    wait()


def find(directory: Path) -> Path | None:
    """Return the newest complete checkpoint."""
    # Between the two renames of `whole_folder` only the old one is there.
    for name in ("checkpoint", ".checkpoint.old"):
        if (directory / name / "progress.json").exists():
            return directory / name
    return None


def progress_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "progress.json").read_text())
