# SPDX-License-Identifier: Apache-2.0
"""Merges a PEFT LoRA adapter into its base file by file, with memory for a few matrices.

A merged file keeps the header of its base file: the names, types and shapes of the tensors stay.
Bytes that the adapter does not change are copied; a tensor that it changes is summed in float32 and
rounded once.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_d2f.hub import HubError, checkpoint
from vllm_d2f.hub.checkpoint import Shard, TensorInfo

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 4096
PIECE = 4 << 20

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_ROWS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Entries of adapter_config.json that this merge follows, and those that only concern training.
# Any other entry must be off (null, false, 0, empty): an adapter of a kind that PEFT adds later is
# then refused instead of merged wrongly.
_FOLLOWED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
_FOLLOWED |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_FOLLOWED |= {"trainable_token_indices"}
_TRAINING = {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
_TRAINING |= {"lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size"}
_TRAINING |= {"peft_version", "eva_config"}
# Initialisations that leave the base as it is; the others store a difference to a changed base.
_PLAIN_INIT = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Pair:
    """W += scaling * B @ A, for one module of `shape` (outputs, inputs)."""

    module: str
    key_a: str
    key_b: str
    shape: tuple[int, int]
    scaling: float


@dataclass(frozen=True, slots=True)
class Rows:
    """W[indices] = rows, for the embedding of some tokens (PEFT's `trainable_token_indices`)."""

    module: str
    key: str
    shape: tuple[int, int]  # (tokens, hidden size)
    indices: list[int]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter whose config and header were read, with what it changes by module."""

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, Pair | Rows]


def read_adapter(folder: Path) -> Adapter:
    """Read and check an adapter in PEFT's layout, but no weights.

    Raises:
        HubError: names the entry or tensor that cannot be merged.
    """
    if not (folder / CONFIG).exists():
        raise HubError(f"{folder}: no {CONFIG}; is it a PEFT adapter's folder?")
    config = checkpoint.read_json(checkpoint.plain_file(folder, CONFIG))
    _check_config(folder / CONFIG, config)
    if not (folder / WEIGHTS).exists():
        checkpoint.refuse_pickle(folder, "adapter")
    shard = checkpoint.read_header(checkpoint.plain_file(folder, WEIGHTS))
    sides: dict[str, dict[str, str]] = {}
    rows: dict[str, Pair | Rows] = {}
    for key in shard.tensors:
        if found := _ROWS.fullmatch(key):
            rows[found["module"]] = _rows(shard, config, found["module"], key)
            continue
        found = _KEY.fullmatch(key)
        if found is None:
            raise HubError(
                f"{shard.path}: {key!r:.150} is not a LoRA tensor (base_model.model.MODULE."
                "lora_A.weight or lora_B); this kind of adapter is not supported"
            )
        sides.setdefault(found["module"], {})[found["side"]] = key
    if not sides:
        raise HubError(f"{shard.path}: holds no tensors")
    pairs = {module: _pair(shard, config, module, keys) for module, keys in sides.items()}
    if both := rows.keys() & pairs.keys():
        raise HubError(f"{shard.path}: changes {min(both)} in two ways, which is not supported")
    return Adapter(folder, config, {**pairs, **rows})


def match(adapter: Adapter, base: Iterable[str]) -> dict[str, Pair | Rows]:
    """Find the base tensor of each change; return tensor -> change.

    Args:
        base: names of the base's tensors.

    Raises:
        HubError: a module or target without a tensor in the base, or a target without a pair.
    """
    modules = {name.removesuffix(".weight") for name in base if name.endswith(".weight")}
    for module in adapter.pairs:
        if module not in modules:
            raise HubError(
                f"{adapter.folder}: adds to {module}, which the base does not have. The adapter "
                f"belongs to another model; the base has for example {min(modules, default='none')}"
            )
    targets = adapter.config.get("target_modules")
    # A regular expression, or "all-linear", lists no modules.
    for target in map(str, targets if isinstance(targets, list) else ()):
        wanted = sorted(m for m in modules if m == target or m.endswith(f".{target}"))
        if not wanted:
            raise HubError(
                f"{adapter.folder / CONFIG}: target_modules names {target!r:.100}, which matches "
                "no tensor of the base"
            )
        some_layers = adapter.config.get("layers_to_transform") is not None
        some_layers |= bool(adapter.config.get("exclude_modules"))
        missing = [module for module in wanted if module not in adapter.pairs]
        # The head may have the name of a module of the layers, and the adapter may leave it out.
        in_layers = [module for module in missing if re.search(r"\.\d+\.", module)]
        if len(missing) == len(wanted) or (in_layers and not some_layers):
            raise HubError(
                f"{adapter.folder}: target_modules names {target}, but there is no lora_A and "
                f"lora_B for {(in_layers or missing)[0]}; the adapter is incomplete"
            )
    return {f"{module}.weight": pair for module, pair in adapter.pairs.items()}


def check_shapes(matched: Mapping[str, Pair | Rows], base: Mapping[str, TensorInfo]) -> None:
    """Refuse a pair whose product has another shape than its base tensor, and rows likewise."""
    for name, pair in matched.items():
        info = base[name]
        fits = info.shape == pair.shape
        if isinstance(pair, Rows) and len(info.shape) == 2:
            fits = info.shape[1] == pair.shape[1] and max(pair.indices) < info.shape[0]
        if not fits:
            raise HubError(
                f"{pair.module}: the adapter adds a matrix of shape {pair.shape} to a base tensor "
                f"of shape {info.shape}; the adapter belongs to a model of another size"
            )
        if info.dtype not in _DTYPES:
            raise HubError(
                f"{name}: stored as {info.dtype}. Merge into the base in bfloat16 or float32 "
                "and quantize the result, for example with --quantization when serving"
            )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    def refuse(name: str, why: str) -> None:
        raise HubError(f"{path}: {name} = {config.get(name)!r:.100} cannot be merged: {why}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA adapters are supported")
    if not _is_rank(config.get("r")):
        refuse("r", f"must be an integer from 1 to {MAX_RANK}")
    if not _is_number(config.get("lora_alpha")):
        refuse("lora_alpha", "must be a finite number")
    for name, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = config.get(name)
        if pattern and not (isinstance(pattern, dict) and all(map(good, pattern.values()))):
            refuse(name, "must map module names to numbers")
    if not isinstance(config.get("use_rslora", False), bool):
        refuse("use_rslora", "must be true or false")
    if config.get("bias", "none") != "none":
        refuse("bias", "only 'none' is supported; the adapter changes biases too")
    init = config.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INIT):
        refuse("init_lora_weights", "it stores a difference to a base that was changed in training")
    for name, value in config.items():
        if name not in _FOLLOWED | _TRAINING and value:
            refuse(name, "plain LoRA only; merge this adapter with the peft that wrote it")


def _pair(shard: Shard, config: Mapping[str, Any], module: str, keys: Mapping[str, str]) -> Pair:
    for side in "AB":
        if side not in keys:
            raise HubError(f"{shard.path}: {module} has no lora_{side}; the adapter is incomplete")
    info_a, info_b = shard.tensors[keys["A"]], shard.tensors[keys["B"]]
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if len(info_a.shape) != 2 or len(info_b.shape) != 2:
        raise HubError(f"{shard.path}: {module}: only linear layers are supported")
    if info_a.shape[0] != rank or info_b.shape[1] != rank:
        raise HubError(
            f"{shard.path}: {module} has lora_A {info_a.shape} and lora_B {info_b.shape}, but "
            f"{CONFIG} says rank {rank}"
        )
    for info in (info_a, info_b):
        if info.dtype not in _DTYPES:
            raise HubError(f"{shard.path}: {module} is stored as {info.dtype}, not as floats")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Pair(module, keys["A"], keys["B"], (info_b.shape[0], info_a.shape[1]), scaling)


def _rows(shard: Shard, config: Mapping[str, Any], module: str, key: str) -> Rows:
    listed = config.get("trainable_token_indices")
    indices = listed.get(module.rsplit(".", 1)[-1]) if isinstance(listed, dict) else listed
    shape = shard.tensors[key].shape
    if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
        raise HubError(f"{shard.path}: trainable_token_indices = {listed!r:.80} names no tokens")
    if len(shape) != 2 or shape[0] != len(indices) or not indices:
        raise HubError(f"{shard.path}: {key} has shape {shape} for {len(indices)} tokens")
    if shard.tensors[key].dtype not in _DTYPES:
        raise HubError(f"{shard.path}: {module} is stored as {shard.tensors[key].dtype}")
    return Rows(module, key, (shape[0], shape[1]), indices)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        # A pattern is a regular expression from a stranger: refuse what can take exponential time.
        if len(pattern) > 200 or re.search(r"[+*{(?]", pattern.replace(".*", "", 1)):
            raise HubError(f"{CONFIG}: the pattern {pattern!r:.100} is not supported")
        try:
            hit = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise HubError(f"{CONFIG}: bad pattern {pattern!r:.100} ({error})") from None
        if hit:
            return value
    return default


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def merge_weights(
    base: Sequence[Shard],
    adapter: Adapter | None,
    folder: Path,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, dict[str, Any]]:
    """Write the merged weight files into `folder`, which must exist.

    All names and shapes are checked before the first byte is written.

    Args:
        adapter: None copies the base.
        progress: called with the number of bytes just written.

    Returns:
        File name -> its "size" and "sha256", for the record.

    Raises:
        HubError: the adapter does not fit the base, or a sum leaves the range of its type.
        OSError: the disk is full.
    """
    tensors = {name: info for shard in base for name, info in shard.tensors.items()}
    matched = match(adapter, tensors) if adapter else {}
    check_shapes(matched, tensors)
    written = {}
    opened = safe_open(adapter.folder / WEIGHTS, framework="pt") if adapter else nullcontext()
    with opened as weights:
        for shard in base:
            target = folder / shard.path.name
            written[target.name] = _merge_file(shard, matched, weights, target, progress)
    return written


def _merge_file(
    shard: Shard,
    matched: Mapping[str, Pair | Rows],
    weights: Any,
    target: Path,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    digest = hashlib.sha256()
    with shard.path.open("rb") as source, target.open("xb") as sink:

        def write(data: Any) -> None:
            sink.write(data)
            digest.update(data)
            progress(len(data))

        def copy_to(end: int) -> None:
            while count := min(PIECE, end - source.tell()):
                write(_read(source, count))

        for name, info in shard.tensors.items():
            if name in matched:
                copy_to(info.begin)
                raw = bytearray(_read(source, info.end - info.begin))
                write(_add(raw, info, matched[name], weights))
        copy_to(shard.size)
        return {"size": sink.tell(), "sha256": digest.hexdigest()}


def _add(raw: bytearray, info: TensorInfo, pair: Pair | Rows, weights: Any) -> memoryview:
    """Return the bytes of W + scaling * B @ A, summed in float32, or of W with other rows."""
    keys = (pair.key,) if isinstance(pair, Rows) else (pair.key_a, pair.key_b)
    tensors = [weights.get_tensor(key).float() for key in keys]
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise HubError(f"{pair.module}: the adapter holds infinite or undefined values")
    stored = _DTYPES[info.dtype]
    base_OI = torch.frombuffer(raw, dtype=stored).view(info.shape)
    sum_OI: Tensor
    if isinstance(pair, Rows):
        sum_OI = base_OI
        sum_OI[pair.indices] = tensors[0].to(stored)
    else:
        a_RI, b_OR = tensors
        sum_OI = (b_OR @ a_RI).mul_(pair.scaling).add_(base_OI).to(stored)
    if not torch.isfinite(sum_OI).all():
        raise HubError(
            f"{pair.module}: the merged tensor does not fit {stored}; use a base in bfloat16"
        )
    return sum_OI.view(torch.uint8).numpy().data.cast("B")


def _read(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise HubError(f"{source.name}: became shorter while it was read")
    return data
