# SPDX-License-Identifier: Apache-2.0
"""What the decoding of a finished request took."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

__all__ = ["RequestTrace", "denoising_forwards", "request_trace"]


def denoising_forwards(output: "CompletionOutput") -> int:
    """Forwards in which the request's window was denoised.

    A prompt usually rides with the first of them; where it was prefilled alone (a full batch, a
    preemption), that forward is not counted.
    """
    metrics = output.spec_decode_metrics
    if metrics is None:
        raise ValueError("no counters on this output: it is unfinished or not from a D2F model")
    return sum(metrics.histogram)


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """What a request with the option `d2f_trace` gets beside its answer.

    Attributes:
        forwards: denoising forwards so far.
        tokens_per_forward: tokens that left so far, divided by them.
        decided_at: for each token of the answer the forward that decided it, the first being 1. A
            stop string ends an answer in the middle of what a forward decided: then the list may
            be longer than the answer.
    """

    forwards: int
    tokens_per_forward: float
    decided_at: list[int]


def request_trace(output: "RequestOutput") -> RequestTrace:
    """The trace of an output (over HTTP: `kv_transfer_params.d2f` of the response).

    Raises:
        ValueError: the request did not ask for it.
    """
    params = output.kv_transfer_params or {}
    if "d2f" not in params:
        raise ValueError(
            'this output has no trace; ask with SamplingParams(extra_args={"d2f_trace": 1})'
        )
    return RequestTrace(**params["d2f"])
