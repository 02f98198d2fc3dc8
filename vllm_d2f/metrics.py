# SPDX-License-Identifier: Apache-2.0
"""What a finished request cost, from vLLM's own per-request counters."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

__all__ = ["denoising_forwards"]


def denoising_forwards(output: "CompletionOutput") -> int:
    """Forwards in which the request's window was denoised.

    A prompt usually rides with the first of them; where it was prefilled alone (a full batch, a
    preemption), that forward is not counted.
    """
    metrics = output.spec_decode_metrics
    if metrics is None:
        raise ValueError("no counters on this output: it is unfinished or not from a D2F model")
    return sum(metrics.histogram)
