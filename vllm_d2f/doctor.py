# SPDX-License-Identifier: Apache-2.0
"""What would keep this machine from serving a model by name, in one screen."""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from importlib.util import find_spec
from typing import Any

from vllm_d2f.hub import HubError, cache, human
from vllm_d2f.hub.command import overview
from vllm_d2f.hub.download import check_space
from vllm_d2f.models import PUBLISHED

Finding = tuple[str, bool, str]
"""What was checked, whether it is right, and what was found or what to do."""


def diagnose(names: Sequence[str]) -> Iterator[Finding]:
    """Look at all that serving these models needs. Loads vLLM and registers the plugin."""
    memory = float("inf")
    try:
        yield _packages()
        memory, *findings = _vllm()
        yield from findings
    except Exception as error:  # whatever it is, vLLM would end with it too
        yield "vLLM", False, f"{type(error).__name__}: {error}"
    rows = [row for row in overview() if row["name"] in names]
    absent = [row["name"] for row in rows if row["state"] == "absent"]
    yield from (_model(row, memory) for row in rows)
    if on_hub := [name for name in absent if not PUBLISHED[name].wheel]:
        yield _hub(on_hub)
    if absent:
        yield _disk(max(absent, key=lambda name: PUBLISHED[name].gigabytes))


def _packages() -> Finding:
    """Return the packages that this one requires, without those of its extras."""
    from packaging.requirements import Requirement

    fit: list[str] = []
    wrong: list[str] = []
    for requirement in map(Requirement, requires("vllm-d2f") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        fits = found and requirement.specifier.contains(found, prereleases=True)
        (fit if fits else wrong).append(
            f"{requirement.name} {found}" if fits else f"'{requirement}'"
        )
    if wrong:
        return "packages", False, f"not as required; pip install {' '.join(wrong)}"
    return "packages", True, ", ".join(fit)


def _vllm() -> Iterator[Any]:
    """Yield the device's memory in bytes, then the findings of what needs vLLM."""
    import vllm_d2f

    vllm_d2f.register()  # refuses other versions of vLLM with the remedy

    import torch
    import vllm
    from vllm.platforms import current_platform

    from vllm_d2f.cpu import emulates

    served = current_platform.is_cpu() or current_platform.is_cuda()
    yield current_platform.get_device_total_memory() if served else float("inf")
    yield "vLLM", True, vllm.__version__
    found = any(point.name == "d2f" for point in entry_points(group="vllm.general_plugins"))
    loaded = found and "d2f" in os.environ.get("VLLM_PLUGINS", "d2f").split(",")
    why = "vLLM does not load it; install the package, and name d2f in VLLM_PLUGINS if that is set"
    yield "plugin", loaded, "vLLM loads it" if loaded else why
    backend = "vLLM's CPU backend"
    if current_platform.is_cpu() and emulates(torch.bfloat16):
        backend += "; give --dtype float32, this processor has no instructions for bfloat16"
    if not served:
        backend = "D2F runs on CPUs and on CUDA, and this vLLM is built for neither"
    elif current_platform.is_cuda():
        there = find_spec("flashinfer") is not None
        chosen = "one that vLLM chooses; faster with pip install flashinfer-python"
        backend = "FlashInfer" if there else chosen
    yield "attention", served, backend


def _model(row: dict[str, Any], memory: float) -> Finding:
    """Check that a model is complete and fits into the memory of one device."""
    if row["state"] == "damaged":
        return row["name"], False, row["reason"]
    size = row["size"] or PUBLISHED[row["name"]].gigabytes * 1e9
    needed = int(1.1 * size)  # with the cache and activations of a few requests
    said = f"{row['state']}; needs about {human(needed)} of memory"
    if needed > memory:
        remedy = "serve it quantised, on several devices, or elsewhere"
        return row["name"], False, f"{said}, the device has {human(int(memory))}: {remedy}"
    return row["name"], True, said


def _hub(names: Sequence[str]) -> Finding:
    """Check that the bases of models can be downloaded. Name the first that cannot."""
    from huggingface_hub import HfApi

    for name in names:
        base = PUBLISHED[name].base
        try:
            HfApi().model_info(base, timeout=10)
        except Exception as error:  # of the network, its library, or the Hub's answer
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            said = f"{base} is out of reach ({why:.150}); folders that were brought here will do: "
            return "Hub", False, said + f"python -m vllm_d2f prepare {name} --base DIR"
    return "Hub", True, f"has {', '.join(names)}"


def _disk(name: str) -> Finding:
    """Check that the disk has room for the downloads and the merged copy of the largest model."""
    needed = int(2e9 * PUBLISHED[name].gigabytes)
    try:
        check_space(cache.root(), needed, name)
    except HubError as error:
        return "disk", False, str(error)
    return "disk", True, f"{cache.root()} has room for {name}, {human(needed)}"
