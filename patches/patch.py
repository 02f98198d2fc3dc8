# SPDX-License-Identifier: Apache-2.0
"""What a patch is, and the two operations every patch is made of: check the target, replace it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SUPPORTED_VLLM = ">=0.32,<0.34"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patch:
    """One change to vLLM, with everything a reader needs to judge and later remove it.

    Attributes:
        name: File name of the patch without `.py`.
        target: The upstream symbols it replaces, as `module:attribute`.
        why: What does not work without it.
        how: What the replacement does, and for whom vLLM stays untouched.
        upstream: Where upstream stands on it.
        remove_when: The observable fact that makes it unnecessary.
        when: The condition `needed` tests, in words.
        source_sha256: `module:attribute` -> sha256 of the source it was written against.
        apply: Installs it. May be called again; must then do nothing.
        needed: Whether this process needs it. Imports vLLM, so only called by `apply_all`.
        checked_late: The targets are in modules that must not be imported in every process.
            `apply` at most arms it, and runs `check_sources` when a worker has imported them.
    """

    name: str
    target: tuple[str, ...]
    why: str
    how: str
    upstream: str
    remove_when: str
    when: str
    source_sha256: Mapping[str, str] = field(repr=False)
    apply: Callable[[], None] = field(repr=False)
    needed: Callable[[], bool] = field(repr=False)
    checked_late: bool = False


def gone(patch: str, target: str, problem: str) -> RuntimeError:
    """The error for an upstream symbol this patch cannot work with."""
    return RuntimeError(
        f"vllm-d2f patch {patch}: {target} {problem}. This release of vllm-d2f supports vLLM "
        f"{SUPPORTED_VLLM}; install one of those, or a newer vllm-d2f."
    )


def function_of(attribute: Any) -> Any:
    """The plain function behind a method, classmethod, property, or a function we replaced."""
    if isinstance(attribute, property):
        attribute = attribute.fget
    elif isinstance(attribute, classmethod | staticmethod):
        attribute = attribute.__func__
    return vars(attribute).get("_d2f_original", attribute)


def find(patch: str, target: str) -> tuple[Any, str, Any]:
    """Resolve `module:Class.attribute`.

    Returns:
        The object that holds the attribute, the attribute's name, and its raw value (a
        `property` or `classmethod` object, not what it evaluates to).
    """
    module_name, _, path = target.partition(":")
    *outer, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module_name)
        for part in outer:
            owner = vars(owner)[part]
        return owner, name, vars(owner)[name]
    except (ImportError, KeyError) as missing:
        raise gone(patch, target, "does not exist in the installed vLLM") from missing


def source_hash(attribute: Any) -> str:
    """sha256 of the source text of a function or of what a descriptor wraps."""
    return hashlib.sha256(inspect.getsource(function_of(attribute)).encode()).hexdigest()


def check_sources(patch: str, source_sha256: Mapping[str, str]) -> list[str]:
    """Compare upstream with what the patch was written against.

    A changed body is a warning, because a small upstream release must not stop users; a missing
    symbol is an error.

    Returns:
        The targets whose source changed.
    """
    changed = [
        target
        for target, expected in source_sha256.items()
        if source_hash(find(patch, target)[2]) != expected
    ]
    if changed:
        logger.warning(
            "vllm-d2f patch %s was written against another version of %s. It is applied all the "
            "same; if something misbehaves, report it with the output of `python -m "
            "vllm_d2f.patches`.",
            patch,
            ", ".join(changed),
        )
    return changed


def positional(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters, without keyword-only ones (a stand-in may add those)."""
    return [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)
    ]


def check_parameters(patch: str, target: str, original: Any, new: Any) -> None:
    """Fail clearly when upstream changed the signature that `new` reproduces.

    `new` may go on behind upstream's last parameter with some that have defaults: those of a
    later version.
    """
    theirs = [p.name for p in positional(original)]
    ours = positional(new)
    later = ours[len(theirs) :]
    if [p.name for p in ours[: len(theirs)]] != theirs or any(p.default is p.empty for p in later):
        raise gone(patch, target, f"takes {theirs}, expected {[p.name for p in ours]}")


def replace(
    patch: str, target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace the function `target` by `make(original)`, once.

    The replacement must have the parameters of the original. It carries the original in
    `_d2f_original`, which is also how a second call recognises that it has nothing to do.
    """
    owner, name, attribute = find(patch, target)
    original = function_of(attribute)
    if isinstance(attribute, property):
        current: Any = attribute.fget
    elif isinstance(attribute, classmethod):
        current = attribute.__func__
    else:
        current = attribute
    if current is not original:
        return
    new = make(original)
    check_parameters(patch, target, original, new)
    functools.update_wrapper(new, original)
    vars(new)["_d2f_original"] = original
    if isinstance(attribute, property):
        setattr(owner, name, property(new))
    elif isinstance(attribute, classmethod):
        setattr(owner, name, classmethod(new))
    else:
        setattr(owner, name, new)
