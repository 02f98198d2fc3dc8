# SPDX-License-Identifier: Apache-2.0
"""Discrete Diffusion Forcing (D2F, arXiv 2508.09192) in stock vLLM.

Importing this package is light and safe without a GPU: vLLM is imported by `register()` only,
which vLLM calls in each of its processes through the entry point `vllm.general_plugins`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_d2f.models.family import Family

__version__ = "0.1.0"

__all__ = ["__version__", "register"]


def register(*families: "Family") -> None:
    """Make stock vLLM serve D2F models. Safe to call more than once.

    Args:
        families: model families beside those of this package. vLLM has several processes: a package
            that brings a family calls this from a `vllm.general_plugins` entry point of its own.

    Raises:
        RuntimeError: the installed vLLM is not a version this release was written against.
    """
    from vllm_d2f.plugin import register_all

    register_all(*families)
