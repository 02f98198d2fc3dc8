# SPDX-License-Identifier: Apache-2.0
"""Merge an adapter into a base, file by file, in memory for a few matrices.

A merged file has the header of its base file, since names, types and shapes stay. What the adapter
does not touch is copied in pieces; a tensor that it touches is summed in float32 and rounded once.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vllm_d2f.hub.adapter import Adapter, Pair, check_shapes, delta, match
from vllm_d2f.hub.errors import HubError
from vllm_d2f.hub.folder import Checkpoint, Shard

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Written", "merge_weights"]

PIECE = 4 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: bytes and sha256."""

    size: int
    sha256: str


def merge_weights(
    base: Checkpoint,
    adapter: Adapter,
    folder: Path,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, Written]:
    """Write the merged weight files into `folder`, which must exist.

    Nothing is written before all names and shapes have been checked.

    Args:
        progress: called with the number of bytes just written.

    Returns:
        File name -> what was written, each synchronised to the disk.

    Raises:
        HubError: the adapter does not fit the base, or a sum leaves the range of its type.
        OSError: the disk is full.
    """
    from safetensors import safe_open

    tensors = base.tensors
    matched = match(adapter, tensors)
    check_shapes(matched, tensors)
    written = {}
    with safe_open(adapter.shard.path, framework="pt") as weights:
        for shard in base.shards:
            pairs = {name: matched[name] for name in shard.tensors if name in matched}
            written[shard.path.name] = _merge_file(
                shard, pairs, weights, folder / shard.path.name, progress
            )
    return written


def _merge_file(
    shard: Shard,
    pairs: Mapping[str, Pair],
    weights: Any,
    target: Path,
    progress: Callable[[int], object],
) -> Written:
    digest = hashlib.sha256()
    with shard.path.open("rb") as source, target.open("xb") as sink:

        def write(data: Any) -> None:
            sink.write(data)
            digest.update(data)
            progress(len(data))

        position = 0
        for name, info in shard.tensors.items():
            if name not in pairs:
                continue
            _copy(source, write, info.begin - position)
            raw = bytearray(_read(source, info.end - info.begin))
            write(_add(raw, info.dtype, info.shape, pairs[name], weights))
            position = info.end
        _copy(source, write, shard.size - position)
        sink.flush()
        os.fsync(sink.fileno())
        return Written(sink.tell(), digest.hexdigest())


def _add(
    raw: bytearray, dtype: str, shape: tuple[int, ...], pair: Pair, weights: Any
) -> memoryview:
    """The bytes of a base tensor plus its pair's product."""
    import torch

    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    base_OI = torch.frombuffer(raw, dtype=stored).view(shape)
    sum_OI: Tensor = delta(pair, weights).add_(base_OI).to(stored)
    if not torch.isfinite(sum_OI).all():
        raise HubError(
            f"{pair.module}: the merged tensor does not fit {stored}; use a base in bfloat16"
        )
    return sum_OI.view(torch.uint8).numpy().data.cast("B")


def _copy(source: BinaryIO, write: Callable[[Any], None], count: int) -> None:
    while count:
        piece = _read(source, min(PIECE, count))
        write(piece)
        count -= len(piece)


def _read(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise HubError(f"{source.name}: became shorter while it was read")
    return data
