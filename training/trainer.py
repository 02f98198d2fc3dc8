# SPDX-License-Identifier: Apache-2.0
"""One stage of a training: its model, data and teacher, the loop, its log, and its end.

Everything random about update number `i` comes from the stage's seed and `i`, so a training that
was interrupted continues to the same weights.

Shapes: B rows, T tokens, V vocabulary.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Generator, Tensor
from tqdm import tqdm

from training import checkpoint, evaluate
from training.answers import greedy_answers
from training.config import Config, DataSection, ModelSection, StageSection
from training.data import (
    Batch,
    Example,
    Records,
    Source,
    end_of,
    fingerprint,
    make_source,
    training_batch,
    validation,
)
from training.model import Base, Loaded, Predictor, adapter_state, add_lora, as_teacher, load
from training.objectives import TINY, Loss, d2f_loss, diffusion_loss, next_token_loss
from training.optim import learning_rate, make_optimizers, set_learning_rate
from training.report import read_log
from vllm_d2f.output import write_at_once


@dataclass
class Run:
    """One stage while it runs."""

    config: Config
    name: str
    directory: Path
    accelerator: Accelerator
    loaded: Loaded
    predictor: Predictor
    teacher: Predictor | None
    source: Source
    held_out: list[Example]
    adapter: dict[str, Tensor] | None = None
    """The teacher's adapter, if the student continues to train it."""
    optimizers: list[Any] = field(default_factory=list)
    model: Any = None
    """`predictor`, wrapped for the devices."""

    @property
    def stage(self) -> StageSection:
        return self.config.stages[self.name]

    @property
    def data(self) -> DataSection:
        return data_of(self.config, self.name)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer; the first one fills what is behind it."""
        own = end_of(self.data, self.loaded.tokenizer)
        ends = (self.loaded.end, *self.loaded.end_token_ids)
        return tuple(dict.fromkeys(ends if own is None else (*ends, own)))

    @property
    def prompt_block(self) -> int | None:
        options = self.stage.loss
        return options.block_size if options.prompt_attention == "block_causal" else None


def data_of(config: Config, name: str) -> DataSection:
    return config.stages[name].data or config.data


@dataclass(frozen=True)
class Data:
    """The examples of a stage."""

    source: Source
    held_out: list[Example]

    @staticmethod
    def read(config: Config, name: str, base: Base) -> "Data":
        """Read the examples, with the base's tokenizer and without its weights."""
        stage, data = config.stages[name], data_of(config, name)
        block = stage.loss.block_size
        return Data(
            make_source(data, base.tokenizer, block),
            validation(data, base.tokenizer, block, stage.evaluate),
        )


def set_up(
    config: Config,
    name: str,
    out: Path,
    accelerator: Accelerator,
    attention: str,
    data: Data | None = None,
) -> Run:
    """Load the model a stage starts from, its teacher and, if they are not given, its data."""
    stage = config.stages[name]
    directory = out / name
    weights = out / (stage.start or "") / "final.safetensors"
    if stage.start is not None and not weights.exists():
        raise FileNotFoundError(f"{weights} is missing; run the stage {stage.start} first")
    same_settings(directory, config, name)
    loaded = load(config.model, attention, stage.seed)
    tied = loaded.config.tie_word_embeddings  # then the LM head is not stored
    data = data or Data.read(config, name, loaded)
    same_inputs(directory, inputs(config, name, out, loaded, data))
    if stage.start is not None:
        start = load_file(weights)
        adapted = config.stages[stage.start].lora is not None
        if not adapted:
            loaded.model.load_state_dict(start, strict=not tied)
    done = directory / "final.safetensors"
    shift = loaded.shift or stage.objective == "next_token"
    teacher = None
    needed = stage.objective == "d2f" and stage.loss.distils
    if needed and stage.lora is None:
        teacher = Predictor(copy.deepcopy(loaded.model), shift, attention).requires_grad_(False)
        teacher.eval()
    net = trainable(loaded, stage)
    adapter = None
    if stage.start is not None and adapted:
        net.load_state_dict(start, strict=False)
        adapter = {name: tensor.clone() for name, tensor in adapter_state(net).items()}
    if done.exists():
        net.load_state_dict(load_file(done), strict=stage.lora is None and not tied)
    student = Predictor(net, shift, attention)
    source, held_out = data.source, data.held_out
    run = Run(
        config, name, directory, accelerator, loaded, student, teacher, source, held_out, adapter
    )
    greedy = stage.objective == "d2f" and stage.loss.teacher == "greedy"
    if greedy and isinstance(source, Records) and not done.exists():
        file, longest = directory / "answers.jsonl", run.data.max_length
        run.source = greedy_answers(source, net, run.ends, longest, file, accelerator)
    return run


def trainable(loaded: Loaded, stage: StageSection) -> Any:
    """Return what the stage trains: the whole model, or adapters on it."""
    if stage.lora is None:
        return loaded.model
    return add_lora(loaded, stage.lora, stage.seed, stage.objective != "next_token")


def same_settings(directory: Path, config: Config, name: str) -> None:
    """Refuse a directory that holds another stage or other settings.

    Raises:
        ValueError: its training was begun with others.
    """
    values = {
        "model": config.model.model_dump(mode="json", exclude={"compile", "attention"}),
        "data": data_of(config, name).model_dump(mode="json"),
        "stage": config.stages[name].model_dump(mode="json", exclude={"export", "data"}),
    }
    file = directory / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        # An option that was not there yet had its default.
        sections: dict[str, Any] = {
            "model": ModelSection,
            "data": DataSection,
            "stage": StageSection,
        }
        for key, section in sections.items():
            whole = section.model_validate(before.get(key, {})).model_dump(mode="json")
            before[key] = {name: whole[name] for name in values[key]}
        if before != values:
            other = [k for k in values if before.get(k) != values[k]]
            raise ValueError(
                f"{directory} was begun with other settings ({', '.join(other)}); delete it or "
                "use another --out"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_at_once(file, json.dumps(values, indent=1) + "\n")


def inputs(config: Config, name: str, out: Path, base: Base, data: Data) -> dict[str, str]:
    """Return the fingerprints of what a stage reads, by the fields that name it."""
    found = {"data.validation": fingerprint(data.held_out)}
    if isinstance(data.source, Records):
        found["data.source"] = fingerprint(data.source.all)
    if base.folder is not None:
        found["model.base"] = fingerprint_files(sorted(base.folder.glob("*.safetensors")))
    if (start := config.stages[name].start) is not None:
        found[f"stages.{name}.start"] = fingerprint_files([out / start / "final.safetensors"])
    return found


def fingerprint_files(files: Sequence[Path]) -> str:
    """Return the sha256 of names, sizes and both ends of weight files.

    Training changes every part of such a file.
    """
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for begin in (0, max(size - (1 << 20), 0)):
                file.seek(begin)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


def same_inputs(directory: Path, values: dict[str, str]) -> None:
    """Refuse to continue with other data or weights than the run began with.

    Raises:
        ValueError: their content has changed; the fields are named.
    """
    file = directory / "inputs.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if other := [name for name in values if before.get(name, values[name]) != values[name]]:
        raise ValueError(
            f"{directory} was begun with another content of {', '.join(other)}; bring that back, "
            "delete the folder, or use another --out"
        )
    write_at_once(file, json.dumps(before | values, indent=1) + "\n")


def fit(run: Run, stop_after: int | None = None) -> None:
    """Train, from the last checkpoint where there is one."""
    stage, accelerator = run.stage, run.accelerator
    torch.manual_seed(stage.seed + accelerator.process_index)  # for dropout
    optimizers = make_optimizers(run.predictor, stage.optimizer)
    run.model, *run.optimizers = accelerator.prepare(run.predictor, *optimizers)
    if run.teacher is not None:
        run.teacher = run.teacher.to(accelerator.device)
    checkpoint.only_trained(accelerator)
    step, seconds = 0, 0.0
    spread = {"processes": accelerator.num_processes}
    if found := checkpoint.find(run.directory):
        before = checkpoint.progress_of(found).get("processes", accelerator.num_processes)
        if before != accelerator.num_processes:
            raise ValueError(
                f"{run.directory} was begun with {before} processes, which decide the order of the "
                f"data; go on with as many, not {accelerator.num_processes}, or use another --out"
            )
        accelerator.load_state(str(found))
        progress = checkpoint.progress_of(found)
        step, seconds = progress["step"], progress["seconds"]
    log = Log(run, step, seconds)
    if step == 0:
        look(run)
    run.model.train()
    last = min(stage.steps, stop_after or stage.steps)
    bar = tqdm(
        total=stage.steps, initial=step, desc=run.name, disable=not accelerator.is_main_process
    )
    while step < last:
        set_learning_rate(run.optimizers, learning_rate(step, stage.steps, stage.optimizer))
        whole = torch.zeros((), device=accelerator.device)
        for micro in range(stage.accumulate):
            final = micro == stage.accumulate - 1
            with contextlib.nullcontext() if final else accelerator.no_sync(run.model):
                loss = loss_of(run, step * stage.accumulate + micro)
                accelerator.backward(loss.summed)
            whole = whole + loss.whole
            log.add(loss)
        divide_gradients(run, whole)
        norm = accelerator.clip_grad_norm_(run.model.parameters(), stage.optimizer.clip)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.update()
        evaluating = stage.evaluate_every and step % stage.evaluate_every == 0
        if step % stage.log_every == 0 or evaluating or step == stage.steps:
            figures = evaluation(run) if evaluating or step == stage.steps else {}
            bar.set_postfix(log.write(step, norm, figures))
        if step % stage.save_every == 0 or step == last:
            progress = {"step": step, "seconds": log.seconds(), **spread}
            checkpoint.save(accelerator, run.directory, progress)
    bar.close()


def divide_gradients(run: Run, whole: Tensor) -> None:
    """Turn gradients of sums, which the processes averaged, into those of the update's loss."""
    processes = run.accelerator.num_processes
    scale = processes / float(run.accelerator.reduce(whole, "sum").clamp(min=TINY))
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)


def loss_of(run: Run, index: int) -> Loss:
    """Return the loss of batch number `index`; all that is random comes from that number."""
    stage, accelerator = run.stage, run.accelerator
    index = index * accelerator.num_processes + accelerator.process_index
    batch = batch_of(run, index).to(accelerator.device)
    generator = Generator(accelerator.device).manual_seed(stage.seed * 1_000_003 + index)
    bf16 = stage.precision == "bfloat16"
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
        if stage.objective == "next_token":
            return next_token_loss(run.model, batch, stage.loss)
        if stage.objective == "diffusion":
            return diffusion_loss(run.model, batch, stage.loss, run.loaded.mask_id, generator)
        teacher = run.teacher or adapter_off(run)
        return d2f_loss(run.model, teacher, batch, stage.loss, run.loaded.mask_id, generator)


def batch_of(run: Run, index: int) -> Batch:
    stage = run.stage
    return training_batch(
        run.source, run.data, index, stage.batch_size, stage.seed, stage.loss.block_size,
        run.loaded.end,
    )  # fmt: skip


def adapter_off(run: Run):
    """Return the LoRA student's teacher: the same weights with no adapter, or the teacher's."""
    if run.adapter is not None:
        device = run.accelerator.device
        run.adapter = {name: tensor.to(device) for name, tensor in run.adapter.items()}

    def teacher(*args: Tensor) -> Tensor:
        with as_teacher(run.predictor, run.adapter):
            return run.model(*args)

    return teacher


def look(run: Run) -> None:
    """Print sizes, data and the first batch, to be checked before hours of training."""
    if not run.accelerator.is_main_process:
        return
    parameters = list(run.predictor.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(
        f"\n== {run.name}: {run.stage.objective}, {run.stage.steps} updates of "
        f"{run.stage.batch_size} x {run.stage.accumulate} sequences; "
        f"{trained:,} of {sum(p.numel() for p in parameters):,} parameters trained, "
        f"attention {run.predictor.attention}, {run.accelerator.device}"
    )
    if counts := run.source.report():
        print("   data:", ", ".join(f"{count} {what}" for what, count in counts.items()))
    batch, tokenizer = batch_of(run, 0), run.loaded.tokenizer
    first = batch.document_BT[0] == batch.document_BT[0, 0]
    ids, answer = batch.ids_BT[0][first], batch.answer_BT[0][first]
    print(f"   prompt: {tokenizer.decode(ids[~answer])[-300:]!r}")
    print(f"   answer: {tokenizer.decode(ids[answer])[:300]!r}")
    with torch.no_grad():
        loss = loss_of(run, 0)
    print(f"   loss before training: {loss.total:.4f} (answer {loss.content:.4f})\n", flush=True)
    if not torch.isfinite(loss.total):
        raise ValueError(f"{run.name}: the loss of the first batch is {loss.total}")


class Log:
    """`log.jsonl`, trackers, progress bar. Losses stay on the device until they are shown."""

    def __init__(self, run: Run, step: int, seconds: float) -> None:
        self.run = run
        self.before = seconds
        self.began = time.monotonic()
        self.losses: list[Tensor] = []
        self.file = run.directory / "log.jsonl"
        if self.file.exists() and run.accelerator.is_main_process:
            # Steps behind the checkpoint are trained, and logged, again.
            kept = [json.dumps(entry) for entry in read_log(run.directory) if entry["step"] <= step]
            write_at_once(self.file, "".join(f"{line}\n" for line in kept))

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def add(self, loss: Loss) -> None:
        self.losses.append(torch.stack((loss.total.detach(), loss.content, loss.tail)).float())

    def write(self, step: int, norm: Any, figures: dict[str, float]) -> dict[str, str]:
        means = torch.stack(self.losses).mean(0)
        means = self.run.accelerator.reduce(means, "mean").tolist()
        self.losses = []
        if not all(map(math.isfinite, (*means, float(norm)))):
            raise ValueError(
                f"{self.run.name}: at update {step} the loss is {means[0]}, its gradient's norm "
                f"{float(norm)}; the last checkpoint is from before. Try a smaller optimizer.lr"
            )
        stage, processes = self.run.stage, self.run.accelerator.num_processes
        entry = {
            "step": step,
            "sequences": step * stage.batch_size * stage.accumulate * processes,
            "seconds": self.seconds(),
            "lr": self.run.optimizers[-1].param_groups[0]["lr"],
            **dict(zip(("loss", "loss_content", "loss_tail"), means, strict=True)),
            "norm": float(norm),
            **figures,
        }
        if self.run.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps({k: float(f"{v:.6g}") for k, v in entry.items()}) + "\n")
        if self.run.config.trackers:
            values = {f"{self.run.name}/{k}": v for k, v in entry.items() if k != "step"}
            self.run.accelerator.log(values, step=step)
        return {k: f"{v:.4g}" for k, v in entry.items() if k in ("loss", *figures)}


def evaluation(run: Run) -> dict[str, float]:
    """Decode the validation problems, each objective in its own way."""
    if not run.held_out:
        return {}
    return {
        name: value
        for name, value in decoded(run, run.held_out, 48).as_dict().items()
        if name != "problems"
    }


def decoded(run: Run, examples: list[Example], canvas: int) -> evaluate.Score:
    """Decode with the trained model: greedy, vanilla on a canvas, or D2F's reference loop."""
    decoding, loaded = run.config.decoding, run.loaded
    tokenizer, ends, mask_id = loaded.tokenizer, run.ends, loaded.mask_id
    predictor = run.predictor
    training = predictor.training
    device = next(predictor.parameters()).device

    def logits(*tensors: Tensor) -> Tensor:
        """Return logits on the CPU, where the decoders' tensors are."""
        return predictor(*(tensor.to(device) for tensor in tensors)).cpu()

    predictor.eval()
    try:
        if run.stage.objective == "next_token":
            return evaluate.autoregressive(logits, examples, tokenizer, ends, decoding.max_tokens)
        if run.stage.objective == "diffusion":
            return evaluate.vanilla(logits, examples, tokenizer, ends, mask_id, canvas)
        rule = (run.prompt_block, run.stage.loss.block_origin)
        return evaluate.d2f(logits, examples, tokenizer, ends, mask_id, decoding, *rule)
    finally:
        predictor.train(training)


def take_whole(run: Run, state: dict[str, Tensor]) -> None:
    """Put weights that were spread over devices into a model of one piece, on the CPU."""
    run.loaded = load(run.config.model, run.predictor.attention, run.stage.seed)
    net = trainable(run.loaded, run.stage)
    run.predictor = Predictor(net, run.predictor.shift, run.predictor.attention)
    run.predictor.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
