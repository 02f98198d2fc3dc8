# SPDX-License-Identifier: Apache-2.0
"""Models by a short name: `vllm serve d2f-tiny` runs a model that ships with this package."""

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

__all__ = ["EMBEDDED", "PLANNED", "UnknownModelError", "resolve"]

# name -> what it is. The folders are vllm_d2f/embedded/<name>.
EMBEDDED: dict[str, str] = {
    "d2f-tiny": "the embedded demo model, distilled with D2F",
    "ar-tiny": "its autoregressive sibling, for comparison",
    "dream-tiny": "its diffusion teacher, before distillation",
}


class _Source(NamedTuple):
    base: str
    adapter: str


# Names without weights of their own yet: they stand for a base and an adapter on the Hub.
PLANNED: dict[str, _Source] = {
    "d2f-dream-7b": _Source("Dream-org/Dream-v0-Base-7B", "SJTU-Deng-Lab/D2F_Dream_Base_7B_Lora"),
    "d2f-llada-8b": _Source(
        "GSAI-ML/LLaDA-8B-Instruct", "SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora"
    ),
}

_PREFIXES = ("d2f-", "ar-", "dream-")


class UnknownModelError(ValueError):
    """A name of this package's kind that stands for nothing servable."""


def resolve(name: str) -> str:
    """Return the folder that `name` stands for, or `name` unchanged if it is not one of ours.

    Anything that exists as a path wins over a name, and so does anything with a slash: those are
    folders and Hub ids, which are vLLM's business.

    Raises:
        UnknownModelError: the name looks like one of ours but is none, or has no weights here.
    """
    if not isinstance(name, str) or not name.startswith(_PREFIXES) or "/" in name:
        return name
    if os.sep in name or os.path.exists(name):
        return name
    if name in EMBEDDED:
        folder = Path(str(resources.files("vllm_d2f").joinpath("embedded", name)))
        if not (folder / "config.json").is_file():
            raise UnknownModelError(
                f"the embedded model {name!r} is missing from this installation of vllm-d2f "
                f"(no config.json in {folder}); reinstall the package"
            )
        return str(folder)
    if name in PLANNED:
        raise UnknownModelError(_how_to_build(name))
    known = [*EMBEDDED, *PLANNED]
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UnknownModelError(
        f"unknown model name {name!r}.{hint} vllm-d2f knows {', '.join(known)}. "
        "For anything else give a folder or a Hub id (owner/name)."
    )


def _how_to_build(name: str) -> str:
    base, adapter = PLANNED[name]
    return (
        f"{name!r} has no merged weights to download yet. Build them once: download the base "
        f"{base} and the adapter {adapter}, merge with peft (PeftModel.from_pretrained, then "
        "merge_and_unload and save_pretrained), and serve the merged folder: vllm serve FOLDER "
        """--additional-config '{"d2f": {...}}'"""
    )
