# SPDX-License-Identifier: Apache-2.0
"""What would keep this machine from serving a model by name, in one screen."""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_d2f.hub import HubError, cache, human
from vllm_d2f.hub.command import overview
from vllm_d2f.hub.download import check_space
from vllm_d2f.models import PUBLISHED

Finding = tuple[str, bool, str]
"""What was looked at, whether it is as it must be, and what is there or what to do."""

BESIDE_WEIGHTS = 1.1
"""Memory of a model, in sizes of its weights: cache and activations of a few requests."""


def diagnose(names: Sequence[str]) -> Iterator[Finding]:
    """Look at all that serving these models needs. Loads vLLM and registers the plugin."""
    memory = None
    yield from _versions()
    try:
        memory, *findings = _vllm()
        yield from findings
    except Exception as error:  # whatever keeps vLLM from being imported keeps it from serving
        yield "vLLM", False, f"{type(error).__name__}: {error}"
    rows = [row for row in overview() if row["name"] in names]
    for row in rows:
        yield _model(row, memory)
    absent = [row["name"] for row in rows if row["state"] == "absent"]
    for name in absent:
        yield _hub(name)
    if absent:
        yield _disk(absent)


def _versions() -> Iterator[Finding]:
    """The packages that this one requires, without those of its extras."""
    from packaging.requirements import Requirement

    found, wrong = [], []
    try:
        required = requires("vllm-d2f") or []
    except PackageNotFoundError:
        required = ["vllm-d2f"]
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement} is needed, {installed} is installed")
    remedy = "; pip install " + " ".join(f"'{line.split(' is ')[0]}'" for line in wrong)
    yield "packages", not wrong, "; ".join(wrong) + remedy if wrong else ", ".join(found)


def _vllm() -> Iterator[Any]:
    """The device's memory in bytes, then the findings of what needs vLLM."""
    import vllm_d2f

    vllm_d2f.register()

    import vllm
    from vllm.platforms import current_platform

    from vllm_d2f.patches import applied

    served = current_platform.is_cpu() or current_platform.is_cuda()
    yield current_platform.get_device_total_memory() if served else None
    changed = [name for name, state in applied().items() if "upstream changed" in state]
    yield (
        "vLLM",
        True,
        f"{vllm.__version__}, all patches fit"
        if not changed
        else (f"{vllm.__version__}; of other sources: {', '.join(changed)}"),
    )
    chosen = os.environ.get("VLLM_PLUGINS")
    known = "d2f" in {point.name for point in entry_points(group="vllm.general_plugins")}
    if not known:
        yield "plugin", False, "vLLM does not find it: install the package, pip install -e ."
    elif chosen is not None and "d2f" not in chosen.split(","):
        yield "plugin", False, f"VLLM_PLUGINS={chosen} switches it off: add d2f, or unset it"
    else:
        yield "plugin", True, "vLLM finds it"
    backend = "vLLM's CPU backend"
    if not served:
        backend = "D2F runs on CPUs and on CUDA, and vLLM sees neither; install its build for one"
    elif current_platform.is_cuda():
        backend = "FlashInfer, with blocks of D2F"
        if find_spec("flashinfer") is None:
            backend = "the one vLLM chooses; a faster one: pip install flashinfer-python"
    elif Path("/proc/driver/nvidia").exists():
        backend += "; there is an NVIDIA driver: pip install 'vllm-d2f[gpu]' would use it"
    yield "attention", served, backend


def _model(row: dict[str, Any], memory: int | None) -> Finding:
    """Whether a model is whole and fits into the memory of one device."""
    published = PUBLISHED.get(row["name"])
    size = row["size"] or (int(published.gigabytes * 1e9) if published else 0)
    needed = int(size * BESIDE_WEIGHTS)
    if row["state"] == "damaged":
        return row["name"], False, row["reason"]
    about = f"{row['state']}; needs about {human(needed)} of memory"
    if memory is None:
        return row["name"], True, about
    if needed > memory:
        remedy = "serve it quantised, on several devices, or elsewhere"
        return row["name"], False, f"{about}, the device has {human(memory)}: {remedy}"
    return row["name"], True, f"{about} of {human(memory)}"


def _disk(names: Sequence[str]) -> Finding:
    """Whether downloads and merged copies fit, where the merged ones go."""
    needed = sum(int(2e9 * PUBLISHED[name].gigabytes) for name in names)
    try:
        check_space(cache.root(), needed, " and ".join(names))
    except HubError as error:
        return "disk", False, str(error)
    return "disk", True, f"{human(needed)} fit under {cache.root()}"


def _hub(name: str) -> Finding:
    """Whether the base of a model can be downloaded."""
    from huggingface_hub import HfApi

    base = PUBLISHED[name].base
    try:
        HfApi().model_info(base, timeout=10)
    except Exception as error:  # of the network, its library, or the Hub's answer
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        said = f"{base} is out of reach ({why:.150}); folders that were brought here will do: "
        return "Hub", False, said + f"python -m vllm_d2f prepare {name} --base DIR --adapter DIR"
    return "Hub", True, f"{base} can be downloaded"
