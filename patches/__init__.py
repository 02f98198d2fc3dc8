# SPDX-License-Identifier: Apache-2.0
"""Changes to stock vLLM, each guarded, documented and written to be removed. See README.md.

Importing this package imports no vLLM; `apply_all` does.
"""

from __future__ import annotations

from vllm_d2f.patches import (
    p01_sampling_params,
    p02_cpu_start,
    p03_cpu_kernels,
    p04_forget_finished,
    p05_model_names,
    p06_cpu_package_name,
    p07_beam_search,
    p08_request_fields,
    p09_cpu_async,
    p10_exit_status,
    p11_streamed_input,
    p12_full_graphs,
    p13_warm_up,
)
from vllm_d2f.patches.patch import SUPPORTED_VLLM, Patch, check_sources

__all__ = ["PATCHES", "SUPPORTED_VLLM", "Patch", "applied", "apply_all", "table"]

PATCHES: tuple[Patch, ...] = (
    p01_sampling_params.PATCH,
    p02_cpu_start.PATCH,
    p03_cpu_kernels.PATCH,
    p04_forget_finished.PATCH,
    p05_model_names.PATCH,
    p06_cpu_package_name.PATCH,
    p07_beam_search.PATCH,
    p08_request_fields.PATCH,
    p09_cpu_async.PATCH,
    p10_exit_status.PATCH,
    p11_streamed_input.PATCH,
    p12_full_graphs.PATCH,
    p13_warm_up.PATCH,
)

_applied: dict[str, str] = {}


def apply_all() -> None:
    """Apply every patch this process needs. Safe to call again.

    Raises:
        RuntimeError: an upstream symbol that a patch replaces is gone or takes other parameters.
    """
    for patch in PATCHES:
        if _applied.get(patch.name) is not None:
            continue
        if not patch.needed():
            _applied[patch.name] = f"skipped: applies only when {patch.when}"
            continue
        if patch.checked_late:
            patch.apply()
            _applied[patch.name] = "armed: takes effect in a worker that needs it"
            continue
        changed = check_sources(patch.name, patch.source_sha256)
        patch.apply()
        note = f" (upstream changed: {', '.join(changed)})" if changed else ""
        _applied[patch.name] = "applied" + note


def applied() -> dict[str, str]:
    """Patch name -> what became of it in this process, for bug reports."""
    return {patch.name: _applied.get(patch.name, "not asked yet") for patch in PATCHES}


def table() -> str:
    """The ledger of all patches as Markdown."""
    head = "| patch | target | why | how | applied when | upstream | remove when |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for patch in PATCHES:
        targets = "<br>".join(f"`{t.rpartition(':')[2]}`" for t in patch.target)
        cells = [f"`{patch.name}`", targets, patch.why, patch.how]
        cells += [patch.when, patch.upstream, patch.remove_when]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
