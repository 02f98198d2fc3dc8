# SPDX-License-Identifier: Apache-2.0
"""Base or Instruct: refuse an adapter on the checkpoint that it was not trained on.

Both checkpoints of a family have the same tensors, so the wrong one merges without an error and
answers much worse. What tells them apart is what a folder says about itself.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_d2f.hub.errors import HubError
from vllm_d2f.hub.folder import MAX_JSON, read_json

__all__ = ["Evidence", "check_variant", "of_adapter", "of_base"]

OVERRIDE = "--allow-other-base"

_FAMILIES = ("dream", "llada", "diffucoder")
_VARIANTS = {"base": "base", "instruct": "instruct", "chat": "instruct"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Something that says which variant a folder is, or was trained on."""

    where: str
    text: str
    variant: str


def variant_of(name: str) -> str | None:
    """ "base" or "instruct", from a model's name or path; None if it does not say.

    Only the last part of a path counts, or the repository in a path of the Hub's cache, and only
    if it names a family: a folder that is just called `base` says nothing.
    """
    cached = re.search(r"models--([^/\\]+)", name)
    last = cached[1] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    words = re.split(r"[^a-z0-9]+", last.lower())
    if not any(family in word for family in _FAMILIES for word in words):
        return None
    found = {_VARIANTS[word] for word in words if word in _VARIANTS}
    return found.pop() if len(found) == 1 else None


def of_base(folder: Path, origin: str, config: dict[str, Any]) -> list[Evidence]:
    """What a base says about itself: a Hub id decides alone, a folder is asked in four places."""
    if hub := variant_of(origin) if _is_hub(origin) else None:
        return [Evidence("its name on the Hub", origin, hub)]
    texts = [("the folder's name", str(folder.resolve()))]
    texts.append(("config.json, _name_or_path", str(config.get("_name_or_path") or "")))
    heading = re.search(r"^# +(.+)$", _readme(folder), re.MULTILINE)
    texts.append(("the first heading of README.md", heading[1] if heading else ""))
    found = _evidence(texts)
    if not _has_chat_template(folder):
        found.append(Evidence("tokenizer_config.json", "no chat template", "base"))
    return found


def of_adapter(folder: Path, origin: str, config: dict[str, Any]) -> list[Evidence]:
    """What an adapter says about the base it was trained on."""
    texts = [
        ("adapter_config.json, base_model_name_or_path", config.get("base_model_name_or_path")),
        ("the adapter's name", origin),
    ]
    texts += [("the adapter's README.md, base_model", name) for name in _base_models(folder)]
    return _evidence([(where, str(text or "")) for where, text in texts])


def check_variant(expected: str, evidence: list[Evidence], what: str, remedy: str) -> None:
    """Refuse evidence against `expected`.

    Args:
        expected: "base" or "instruct".
        what: whose evidence it is, with its origin, for the message.
        remedy: what would be right.

    Raises:
        HubError: with where the contradiction stands.
    """
    for item in evidence:
        if item.variant != expected:
            raise HubError(
                f"wrong base: {what} is for {item.variant!r} by {item.where} ({item.text!r:.150}), "
                f"but {expected!r} is needed. The two have the same tensors and very different "
                f"answers. {remedy}, or, if you know better, add {OVERRIDE}"
            )


def _is_hub(origin: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", origin) is not None


def _evidence(texts: list[tuple[str, str]]) -> list[Evidence]:
    return [
        Evidence(where, text, variant) for where, text in texts if (variant := variant_of(text))
    ]


def _readme(folder: Path) -> str:
    path = folder / "README.md"
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _base_models(folder: Path) -> list[str]:
    from huggingface_hub import ModelCard

    text = _readme(folder)
    try:
        found = ModelCard(text, ignore_metadata_errors=True).data.get("base_model")
    except Exception:  # a card is free text; whatever is wrong with it, it says nothing
        return []
    return [str(name) for name in (found if isinstance(found, list) else [found]) if name]


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return not path.exists() or bool(read_json(path).get("chat_template"))
