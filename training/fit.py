# SPDX-License-Identifier: Apache-2.0
"""The training loop: Muon and AdamW, warm-up and cosine, checkpoints that resume exactly.

Losses are functions of the step number: data and noise of a step are drawn from seeds made of it,
so model, optimizer and step are the whole state (the global RNG is saved beside them).
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FitConfig:
    """One training. `steps` batches of `batch_size` sequences."""

    steps: int
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    final_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    muon_factor: float = 2.0
    clip: float = 1.0
    save_every: int = 500
    log_every: int = 50
    seed: int = 0


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine down to `final_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def make_optimizers(model: nn.Module, config: FitConfig) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, output, biases and norms.

    Muon learns this task in less than half of the steps that AdamW alone takes. Its updates are
    scaled to the size of AdamW's, so one learning rate and one factor serve both.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    taken = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in taken]
    adamw = torch.optim.AdamW(
        others, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    muon = torch.optim.Muon(
        inner, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for group in muon.param_groups:
        group["factor"] = config.muon_factor
    return [muon, adamw]


def save_atomically(state: object, path: Path) -> None:
    """Write beside `path`, then rename: a reader never sees half a file."""
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    os.replace(part, path)


def fit(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    config: FitConfig,
    directory: Path,
    on_log: Callable[[], dict[str, float]] | None = None,
    stop_after: int | None = None,
) -> None:
    """Train `model` in place, from the last checkpoint in `directory` where there is one.

    Args:
        loss_of_step: the loss of the step with this number, with its graph.
        on_log: more figures for the log, called when a checkpoint is saved.
        stop_after: leave after this many steps in all, as an interruption would (for tests).
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, log = directory / "checkpoint.pt", directory / "log.jsonl"
    optimizers = make_optimizers(model, config)
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state.get("config") != asdict(config):
            raise ValueError(
                f"{checkpoint} was made with other settings; "
                f"delete {directory} or use another --out"
            )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        step, seconds = state["step"], state["seconds"]
    last = min(config.steps, stop_after or config.steps)
    losses: list[float] = []
    began = time.monotonic()
    while step < last:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, config) * group.get("factor", 1.0)
        loss = loss_of_step(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        saving = step % config.save_every == 0 or step == last
        if step % config.log_every == 0 or saving:
            spent = seconds + time.monotonic() - began
            entry = {"step": step, "sequences": step * config.batch_size, "seconds": spent}
            entry |= {"loss": sum(losses) / len(losses), "norm": norm.item()}
            losses = []
            if saving:
                entry |= on_log() if on_log else {}
                state = {"model": model.state_dict()}
                state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
                state |= {"rng": torch.get_rng_state(), "step": step, "seconds": spent}
                state["config"] = asdict(config)
                save_atomically(state, checkpoint)
            with log.open("a") as file:
                file.write(json.dumps({k: round(v, 5) for k, v in entry.items()}) + "\n")
