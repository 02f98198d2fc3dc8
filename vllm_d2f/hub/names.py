# SPDX-License-Identifier: Apache-2.0
"""Models by a short name: `vllm serve d2f-tiny` runs a model that ships with this package.

`vllm serve d2f-dream-7b` runs a published one. The first use of its name downloads and merges it.
"""

import difflib
import os
import re
from importlib import resources
from pathlib import Path

from vllm_d2f.hub import own_name
from vllm_d2f.hub.cache import folder_of, inspect, is_unfinished
from vllm_d2f.hub.checkpoint import is_adapter
from vllm_d2f.models import PUBLISHED

# name -> what it is. The folders are vllm_d2f/embedded/<name>.
EMBEDDED: dict[str, str] = {
    "d2f-tiny": "the embedded demo model, distilled with D2F",
    "ar-tiny": "its autoregressive sibling, for comparison",
    "dream-tiny": "its diffusion teacher, before distillation",
}


# A model's own name -> why it is refused. Nothing in their config.json tells these checkpoints from
# those of the same layout that are served. So the model card in a folder is asked for it, too.
_REFUSED = {
    r"llada2\.[12]": "LLaDA2.1 and 2.2 edit tokens that are decoded, and D2F never changes one",
    r"d3llm": "d3LLM attends in both directions to blocks that are not open and has no exact cache",
}


class UnknownModelError(ValueError):
    """A name that looks like one of this package's, but under which no model can be served."""


def known_names() -> list[str]:
    """Return every name that `resolve` turns into a folder."""
    return [*EMBEDDED, *PUBLISHED]


def is_name(name: str) -> bool:
    """Return whether `name` is one of this package's names. This prepares no model.

    What exists as a path or contains a slash is a folder or a Hub id, and vLLM handles those.

    Raises:
        UnknownModelError: the name begins like one of this package's, but is none.
    """
    known = known_names()
    beginnings = tuple({f"{own.partition('-')[0]}-" for own in known})
    if not isinstance(name, str) or not name.startswith(beginnings):
        return False
    if "/" in name or os.path.exists(name):
        return False
    if name in known:
        return True
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UnknownModelError(
        f"unknown model name {name!r}.{hint} vllm-d2f knows {', '.join(known)}. "
        "For anything else give a folder or a Hub id (owner/name)."
    )


def resolve(name: str) -> str:
    """Return the folder that `name` stands for, or `name` itself if it is none of the package's.

    The first use of a published model downloads and merges it, which takes a while.

    Raises:
        UnknownModelError: as `is_name`; the embedded model is missing.
        vllm_d2f.hub.HubError: the model cannot be prepared; the message says what to do.
    """
    if not is_name(name):
        return name
    if name in EMBEDDED:
        return str(resolve_embedded(name))
    from vllm_d2f.hub.prepare import ensure

    return str(ensure(name))


def tokenizer_of(name: str) -> str:
    """Return where the tokenizer of `name` is; a client of a server downloads no weights for it.

    Raises:
        UnknownModelError: as `is_name`; the embedded model is missing.
    """
    if not is_name(name) or name in EMBEDDED:
        return resolve(name)
    folder = folder_of(name)
    return str(folder) if inspect(folder).kind == "ready" else PUBLISHED[name].base


def resolve_embedded(name: str) -> Path:
    """Return the folder of an embedded model."""
    folder = Path(str(resources.files("vllm_d2f").joinpath("embedded", name)))
    if not (folder / "config.json").is_file():
        raise UnknownModelError(
            f"the embedded model {name!r} is missing from this installation of vllm-d2f "
            f"(no config.json in {folder}); reinstall the package"
        )
    return folder


def card_title(folder: Path) -> str:
    """Return the first heading of a folder's model card (README.md); nothing without one."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    heading = re.search(r"^#\s+(.*)$", card.read_text(encoding="utf-8", errors="replace"), re.M)
    return heading[1].lower() if heading else ""


def refuse_unservable(name: str) -> None:
    """Refuse to serve an adapter alone, a folder that a merge has not completed, or a checkpoint
    whose layout is known but not its decoding.

    Raises:
        UnknownModelError: with what to do.
    """
    for ours, published in PUBLISHED.items():
        if name.lower() == (published.adapter or "").lower() and not os.path.exists(name):
            raise UnknownModelError(
                f"{name} is an adapter. Serve it merged into its base: vllm serve {ours}"
            )
    folder = Path(name)
    for pattern, reason in _REFUSED.items():
        if re.search(pattern, f"{own_name(name)}\n{card_title(folder)}"):
            raise UnknownModelError(f"{name} cannot be served: {reason}")
    if not folder.is_dir():
        return
    if is_unfinished(folder):
        raise UnknownModelError(f"{name} is an unfinished merge; delete it and merge again")
    if is_adapter(folder):
        raise UnknownModelError(
            f"{name} is an adapter. A D2F adapter is merged first: python -m vllm_d2f merge "
            f"--base BASE --adapter {name} --out FOLDER, then vllm serve FOLDER"
        )
