# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint folder that may come from a stranger.

Only JSON and safetensors are read, never pickle. A name in an index must be that of a file directly
in the folder, and a size is the file's own, not the one that a file claims. At start-up the sizes
in config.json are compared with the tensors, before vLLM allocates memory by them.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_d2f.hub import HubError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})

MAX_JSON = 32 << 20
MAX_SHARDS = 1000

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_PLAIN = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a safetensors file. `begin` and `end` are bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file: its size in bytes, and its tensors in the order of their data."""

    path: Path
    size: int
    tensors: dict[str, TensorInfo]


def plain_file(folder: Path, name: str) -> Path:
    """Return the path of the file `name` directly in `folder`.

    A link may lead to another file of the folder or, as in the Hub's cache, to `../../blobs`.

    Raises:
        HubError: it is missing, no regular file, or a link that leads elsewhere.
    """
    path = folder / name
    real = Path(os.path.realpath(path))
    allowed = (folder.resolve(), (folder.resolve() / ".." / ".." / "blobs").resolve())
    if name != os.path.basename(name) or name in ("", ".", "..") or real.parent not in allowed:
        raise HubError(f"{path}: leads out of its folder; put the file itself there")
    if not real.is_file():
        raise HubError(f"{path}: no such file; the folder is incomplete, download it again")
    return path


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds an adapter alone, without a base."""
    weights = any((folder / name).exists() for name in (INDEX, SINGLE))
    return (folder / "adapter_config.json").is_file() and not weights


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        HubError: the file is too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise HubError(f"{path}: larger than {MAX_JSON >> 20} MiB, refused")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise HubError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise HubError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def index_of(folder: Path) -> dict[str, str] | None:
    """Return the index of a folder, tensor -> file; None without an index.

    Raises:
        HubError: a malformed index, or a file name that is more than a name.
    """
    if not (folder / INDEX).exists():
        return None
    path = plain_file(folder, INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HubError(f"{path}: has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise HubError(f"{path}: names the file {file!r:.100}; only *.safetensors beside it")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise HubError(f"{path}: names more than {MAX_SHARDS} files")
    return weight_map


def shard_names(folder: Path) -> list[str]:
    """Return the weight files that belong to a folder: those of its index, else the single one."""
    index = index_of(folder)
    return [SINGLE] if index is None else sorted(set(index.values()))


def refuse_pickle(folder: Path, what: str, names: Iterable[str] | None = None) -> None:
    """Refuse weights in pickle form, if there are any, with the way to convert them.

    Args:
        what: whose weights, for the message.
        names: the files to look at; None looks at those in the folder.
    """
    names = map(str, folder.iterdir()) if names is None else names
    if pickled := sorted(Path(n).name for n in names if Path(n).suffix in _PICKLED):
        raise HubError(
            f"{folder}: its {what} weights are pickle ({pickled[0]}), which can run any code when "
            "it is loaded, so only safetensors are read. Convert it where you trust it: load it "
            "and call save_pretrained(FOLDER, safe_serialization=True)"
        )


def read_header(path: Path) -> Shard:
    """Read the header of a safetensors file; the safetensors library checks it first.

    Raises:
        HubError: the file is damaged or truncated, or its header is too large.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass  # this checks offsets, shapes and the size of the file
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise HubError(f"{path}: damaged or incomplete ({error}); download it again") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), begin, end)
    return Shard(path, size, tensors)


def open_checkpoint(folder: Path) -> list[Shard]:
    """Read the headers of all weight files that belong to a folder, but no weights.

    Raises:
        HubError: something is missing, damaged, contradictory, or not safetensors.
    """
    index = index_of(folder)
    if index is None and not (folder / SINGLE).exists():
        refuse_pickle(folder, "model")
        raise HubError(f"{folder}: neither {SINGLE} nor {INDEX}; is it a checkpoint's folder?")
    shards = [read_header(plain_file(folder, name)) for name in shard_names(folder)]
    held: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in held:
                raise HubError(f"{shard.path}: {name} is also in {held[name]}")
            held[name] = shard.path.name
    for name, file in (index or {}).items():
        if held.get(name) != file:
            raise HubError(
                f"{folder / INDEX}: says {name!r:.100} is in {file}, it is in {held.get(name)}; "
                "the folder mixes two downloads, download it again"
            )
    return shards


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer: transformers makes an empty one of nothing.

    Raises:
        HubError: naming the files.
    """
    names = {path.name for path in folder.iterdir()}
    if not any(names >= files for files in _TOKENIZERS):
        raise HubError(
            f"{folder}: holds no tokenizer, neither tokenizer.json nor vocab.json with merges.txt; "
            "copy the tokenizer's files from where the model is from"
        )


def check_weight_files(vllm_config: "VllmConfig") -> None:
    """Refuse weights that are not safetensors, and files that contradict the folder's config.json.

    vLLM downloads a Hub id itself, and then has nothing but safetensors to load.

    Raises:
        ValueError: with what to change.
    """
    load_config, model_config = vllm_config.load_config, vllm_config.model_config
    load_format = str(load_config.load_format)
    if load_format in ("pt", "npcache"):
        raise ValueError(
            f"--load-format {load_format}: it reads pickle, which can run any code; D2F models are "
            "read from safetensors only. Remove it"
        )
    if load_format in ("auto", "hf"):
        # Both fall back to pickle where there are no safetensors.
        load_config.load_format = "safetensors"
    folder = Path(model_config.model)
    if load_format == "dummy" or not folder.is_dir():
        return
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        refuse_pickle(folder, "model")
        if load_format in ("auto", "hf", "safetensors"):
            raise HubError(f"{folder}: no .safetensors files; is it a checkpoint's folder?")
        return
    index_of(folder)
    config = model_config.hf_config
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        header = read_header(plain_file(folder, name))
        tensors |= {config.family.to_stack(key): info for key, info in header.tensors.items()}
    _check_sizes(folder, config, tensors)


def _check_sizes(folder: Path, config: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a config.json whose sizes are not those of the tensors."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    for layer in (0, config.num_hidden_layers - 1):
        if not any(name.startswith(f"model.layers.{layer}.") for name in tensors):
            raise HubError(
                f"{folder}: config.json says {config.num_hidden_layers} layers, but the weight "
                f"files hold nothing of layer {layer}; they do not belong together"
            )
    expected = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "model.layers.0.self_attn.q_proj.weight": (heads * head_dim, hidden),
    }
    for name, shape in expected.items():
        info = tensors.get(name)
        # Quantized weights are packed in their own ways.
        if info is not None and info.dtype in _PLAIN and info.shape != shape:
            raise HubError(
                f"{folder}: {name} has the shape {info.shape}, config.json says {shape}; they do "
                "not belong together"
            )
