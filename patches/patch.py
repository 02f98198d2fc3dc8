# SPDX-License-Identifier: Apache-2.0
"""The decorator that declares a patch, and how a patch checks and replaces functions of vLLM."""

import functools
import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

SUPPORTED_VLLM = ">=0.32,<0.34"
"""The versions of vLLM that this release supports. `vllm_d2f.plugin` checks them."""

Point = Literal["process", "worker", "server"]

POINTS: dict[Point, str] = {
    "process": "every vLLM process",
    "worker": "workers of a D2F model",
    "server": "servers of a D2F model",
}
"""Where patches are applied: by `plugin`, by `D2FModelState` and by `D2FStatLogger`."""

configs: dict[Point, Any] = {}
"""The `VllmConfig` with which each point was last applied in this process."""

declared: list["Patch"] = []
"""Every patch under the decorator, in the order in which their files are imported."""

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

Original = Callable[..., Any]
"""vLLM's function, as a replacement gets it."""


@dataclass(frozen=True)
class Patch:
    """One change to vLLM, with what a reader needs to judge it and to remove it later.

    Attributes:
        name: The name of the decorated function.
        apply: The point at which it is applied.
        why: What does not work without it.
        how: What the replacement does, and for whom vLLM stays unchanged.
        upstream: What vLLM has or plans, and what it lacks.
        remove_when: The observable fact that makes the patch unnecessary.
        written_against: `module:attribute` -> `source_hash` of it. These are the functions that
            the patch replaces, and those on whose behaviour it relies.
        replacements: `module:attribute` -> the function that replaces it.
        setup: What to call instead, for a patch that replaces no function.
        when: The condition that `needed` tests, in words.
        needed: Whether this process needs the patch, given the configuration (None in `process`).
    """

    name: str
    apply: Point
    why: str
    how: str
    upstream: str
    remove_when: str
    written_against: Mapping[str, str] = field(repr=False)
    replacements: dict[str, Callable[..., Any]] = field(repr=False)
    setup: Callable[[], None] | None = field(repr=False)
    when: str = "always"
    needed: Callable[[Any], bool] = field(default=lambda config: True, repr=False)

    def also(self, target: str) -> Callable[[F], F]:
        """Declare another function that this patch replaces."""

        def add(function: F) -> F:
            self.replacements[target] = function
            return function

        return add

    def wrap(self, target: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Bind the replacement of `target` to the function that it replaces."""
        replacement = self.replacements[target]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        vars(wrapped)["__signature__"] = inspect.signature(functools.partial(replacement, original))
        return wrapped

    def install(self) -> None:
        """Replace the functions. A second call changes nothing."""
        if self.setup is not None:
            self.setup()
        for target in self.replacements:
            replace(self.name, target, functools.partial(self.wrap, target))


def patch(*targets: str, **ledger: Any) -> Callable[[Callable[..., Any]], Patch]:
    """Declare a patch. The decorated function replaces the targets and bears the patch's name.

    It gets the original function first and then the original's parameters: it names those that it
    reads, in the original's order, and passes on the others as `*args, **kwargs`. Without targets
    (`module:attribute`) it is called once, without arguments. `ledger` has the attributes of
    `Patch` from `apply` to `written_against`, `when` and `needed`.
    """

    def declare(function: Callable[..., Any]) -> Patch:
        replacements = dict.fromkeys(targets, function)
        setup = None if targets else function
        made = Patch(function.__name__, replacements=replacements, setup=setup, **ledger)
        declared.append(made)
        return made

    return declare


def is_d2f(model_config: Any) -> bool:
    """Return whether vLLM serves this model through vllm-d2f; False without a model."""
    from vllm_d2f.settings import is_d2f

    return model_config is not None and is_d2f(model_config)


def gone(patch: str, target: str, problem: str) -> RuntimeError:
    """Return the error for a function of vLLM with which a patch cannot work."""
    return RuntimeError(
        f"vllm-d2f patch {patch}: {target} {problem}. This release of vllm-d2f supports vLLM "
        f"{SUPPORTED_VLLM}; install one of those, or a newer vllm-d2f."
    )


def function_of(attribute: Any) -> Any:
    """Return vLLM's plain function behind a method, classmethod, property or replacement."""
    return vars(_inner(attribute)).get("_d2f_original", _inner(attribute))


def _inner(attribute: Any) -> Any:
    if isinstance(attribute, property):
        return attribute.fget
    return attribute.__func__ if isinstance(attribute, classmethod | staticmethod) else attribute


def find(patch: str, target: str) -> tuple[Any, str, Any]:
    """Resolve `module:Class.attribute` to its owner, name and raw value, such as a `property`."""
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
    """Return 16 digits of the sha256 of vLLM's source text, whether or not it is replaced."""
    return hashlib.sha256(inspect.getsource(function_of(attribute)).encode()).hexdigest()[:16]


def check_sources(patch: str, written_against: Mapping[str, str]) -> list[str]:
    """Return the targets whose source is not the one that the patch was written against.

    A changed body is a warning, because a small release of vLLM must not stop users. A missing
    function is an error.
    """
    changed = [
        target
        for target, expected in written_against.items()
        if source_hash(find(patch, target)[2]) != expected
    ]
    if changed:
        logger.warning(
            "vllm-d2f patch %s was written against another version of %s. It is applied "
            "nevertheless; if something misbehaves, report it with the output of `python -m "
            "vllm_d2f.patches`.",
            patch,
            ", ".join(changed),
        )
    return changed


def check_parameters(patch: str, target: str, original: Any, new: Any) -> None:
    """Raise an error if `new` does not take the parameters of vLLM's function.

    `new` may name only the first of them and pass on the rest as `*args`, and it may name further
    ones with defaults, which a later version of vLLM has.
    """
    theirs, ours = _positional(original), _positional(new)
    passes_on = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(new).parameters.values())
    expected = list(theirs)[: len(ours)] if passes_on else list(theirs)
    later = list(ours.values())[len(theirs) :]
    if list(ours)[: len(theirs)] != expected or any(p.default is p.empty for p in later):
        raise gone(patch, target, f"takes {list(theirs)}, expected {list(ours)}")


def _positional(function: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters that are not keyword-only, by name."""
    parameters = inspect.signature(function).parameters
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: p for name, p in parameters.items() if p.kind in kinds}


def replace(patch: str, target: str, make: Callable[[Original], Callable[..., Any]]) -> None:
    """Replace the function `target` by `make(original)`, once.

    The new function carries the original in `_d2f_original`, by which a second call recognises
    that it has nothing to do.
    """
    owner, name, attribute = find(patch, target)
    original = function_of(attribute)
    if _inner(attribute) is not original:
        return
    new = make(original)
    check_parameters(patch, target, original, new)
    functools.update_wrapper(new, original)
    vars(new).pop("__signature__", None)  # from here on the original's
    vars(new)["_d2f_original"] = original
    kind = type(attribute) if isinstance(attribute, property | classmethod) else None
    setattr(owner, name, new if kind is None else kind(new))
