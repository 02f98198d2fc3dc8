# SPDX-License-Identifier: Apache-2.0
"""Changes to stock vLLM, each one checked, documented and written to be removed.

docs/patches.md lists them. Importing this package does not import vLLM; `apply` does.
"""

from typing import Any

from vllm_d2f.patches import (  # noqa: F401
    p01_sampling_params,
    p02_cpu_start,
    p03_cpu_kernels,
    p04_forget_finished,
    p05_model_names,
    p06_cpu_package_name,
    p07_refusals,
    p08_request_fields,
    p09_cpu_async,
    p10_exit_status,
    p12_cuda_graphs,
    p13_warm_up,
    p14_engine_args,
    p15_step_cost,
)
from vllm_d2f.patches.patch import (
    POINTS,
    SUPPORTED_VLLM,
    Patch,
    Point,
    check_sources,
    configs,
    declared,
)

__all__ = ["PATCHES", "SUPPORTED_VLLM", "Patch", "applied", "apply", "table"]

PATCHES: tuple[Patch, ...] = tuple(sorted(declared, key=lambda patch: patch.name))
"""The patches that the files imported above declare."""

_applied: dict[str, str] = {}


def apply(point: Point, config: Any = None) -> None:
    """Apply the patches of a point that this process needs. A second call changes nothing.

    Args:
        point: Where the process is: `process` for each vLLM process, `worker` and `server` for
            those of a D2F model.
        config: The `VllmConfig`, for `worker` and `server`.

    Raises:
        RuntimeError: a function that a patch replaces is gone or takes other parameters.
    """
    configs[point] = config
    for patch in PATCHES:
        if patch.apply != point:
            continue
        if not patch.needed(config):
            _applied.setdefault(patch.name, f"skipped: applies only when {patch.when}")
            continue
        if not _applied.get(patch.name, "").startswith("applied"):
            changed = check_sources(patch.name, patch.written_against)
            note = f" (upstream changed: {', '.join(changed)})" if changed else ""
            _applied[patch.name] = "applied" + note
        patch.install()


def applied() -> dict[str, str]:
    """Return the state of each patch in this process, by name, for bug reports."""
    return {
        patch.name: _applied.get(patch.name, f"not in this process: for {POINTS[patch.apply]}")
        for patch in PATCHES
    }


def table() -> str:
    """Return the ledger of all patches as a Markdown table."""
    head = "| patch | functions of vLLM | why | how | applied in | upstream | remove when |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for patch in PATCHES:
        functions = "<br>".join(f"`{t.rpartition(':')[2]}`" for t in patch.written_against)
        where = POINTS[patch.apply] + (f", when {patch.when}" if patch.when != "always" else "")
        cells = [f"`{patch.name}`", functions, patch.why, patch.how, where]
        lines.append("| " + " | ".join([*cells, patch.upstream, patch.remove_when]) + " |")
    return "\n".join(lines)
