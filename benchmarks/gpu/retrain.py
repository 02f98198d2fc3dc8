# SPDX-License-Identifier: Apache-2.0
"""Stage f: the embedded models trained again at full size, with training/configs/tiny.yaml.

The training keeps checkpoints in the folder that stays and goes on from them, so it may be cut off
anywhere. What comes back is one archive of the exported folders, `models.tar.gz`, small enough to
travel; they are installed as after `make models`.
"""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.run import MAX_BYTES, ROOT
from benchmarks.gpu.stage import Options, Points, Skip, Unfinished

CONFIG = "training/configs/tiny.yaml"
ARCHIVE = "models.tar.gz"


def points(part: str, options: Options) -> Points:
    out = options.work / "tiny"
    if part == "train":
        for stage in ("ar", "teacher", "student"):
            yield f"train/{stage}", partial(train, out, stage, options)
    elif part == "evaluate":
        yield "evaluate/all", lambda: evaluate(out, options)
    else:
        yield "pack/models", lambda: pack(out / "models", options.out / ARCHIVE)


def command(out: Path, options: Options) -> list[str]:
    words = [sys.executable, "-m", "training.train", "--config", CONFIG, "--out", str(out)]
    if options.rehearse or options.quick:
        words.append("--smoke")
    if options.rehearse:
        words += ["--threads", "1"]
    return words


def train(out: Path, stage: str, options: Options) -> dict[str, Any]:
    """One stage of the config; the last line of its log.

    Raises:
        Unfinished: time was up; the next process goes on from the last checkpoint.
    """
    missing = [name for name in ("accelerate", "peft") if find_spec(name) is None]
    if missing:
        raise Skip(f"training needs {', '.join(missing)}: pip install 'vllm-d2f[train]'")
    _run([*command(out, options), "--stages", stage], options.left())
    return {"log": json.loads((out / stage / "done.json").read_text())}


def evaluate(out: Path, options: Options) -> dict[str, Any]:
    """Held-out problems with every exported model; nothing is trained any more."""
    _run(command(out, options), options.left())
    return {"report": json.loads((out / "report.json").read_text())}


def pack(models: Path, archive: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Put the exported folders into one archive.

    Raises:
        RuntimeError: it is too large to travel.
    """
    names = sorted(path.name for path in models.iterdir() if path.is_dir())
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as tar,
    ):
        for file in sorted(path for path in models.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(str(file.relative_to(models)))
            info.size = file.stat().st_size
            with file.open("rb") as opened:
                tar.addfile(info, opened)
    content = buffer.getvalue()
    if len(content) > limit:
        raise RuntimeError(
            f"{len(content) / 2**20:.1f} MiB of models, at most {limit / 2**20:.0f} can travel; "
            f"they lie in {models.name}"
        )
    archive.write_bytes(content)
    return {"models": names, "bytes": len(content), "file": archive.name}


def _run(words: list[str], seconds: float) -> None:
    try:
        done = subprocess.run(words, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Unfinished("goes on from the last checkpoint") from None
    if done.returncode:
        raise RuntimeError(f"training ended with exit code {done.returncode}; see run.log")
