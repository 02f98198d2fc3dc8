# SPDX-License-Identifier: Apache-2.0
"""Discrete Diffusion Forcing (D2F, arXiv 2508.09192) in stock vLLM.

Importing this package is light and safe without a GPU: vLLM is imported by `register()` only,
which vLLM calls in each of its processes through the entry point `vllm.general_plugins`.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "register"]


def register() -> None:
    """Make stock vLLM serve D2F models. Safe to call more than once.

    Raises:
        RuntimeError: the installed vLLM is not a version this release was written against.
    """
    from vllm_d2f.plugin import register_all

    register_all()
