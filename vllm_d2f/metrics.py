# SPDX-License-Identifier: Apache-2.0
"""What decoding cost: of a finished request, and of a scheduler step for `stat_logger`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_d2f.wire import Tally

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

__all__ = ["RequestTrace", "StepCounts", "denoising_forwards", "request_trace"]


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


@dataclass(slots=True)
class StepCounts:
    """What the scheduler counted since it last reported.

    Attributes:
        forwards: denoising forwards, one per request and step.
        processed: positions that went through the model, prompts included.
        committed: positions whose keys and values became final.
        output: tokens that left.
        active: positions decided in fully activated blocks.
        semi: positions decided in the other open blocks.
        dropped: blocks given up behind an end token.
        nonfinite: proposals without a probability, as logits had a NaN or infinity.
        open_blocks: blocks open now, of all requests.
        finished: of each finished request its tokens and its forwards.
    """

    forwards: int = 0
    processed: int = 0
    committed: int = 0
    output: int = 0
    active: int = 0
    semi: int = 0
    dropped: int = 0
    nonfinite: int = 0
    open_blocks: int = 0
    finished: list[tuple[int, int]] = field(default_factory=list)

    def add(self, committed: int, output: int, tally: Tally) -> None:
        """One request's forward."""
        self.forwards += 1
        self.committed += committed
        self.output += output
        self.active += tally.active
        self.semi += tally.semi
        self.dropped += tally.dropped
        self.nonfinite += tally.nonfinite

    def finish(self, tokens: int, forwards: int) -> None:
        """A request is over; one that was never denoised does not count."""
        if forwards:
            self.finished.append((tokens, forwards))

    # vLLM sends a fixed set of fields from the engine to the server. Two lists among them are per
    # position of a speculative draft, and nothing reads them for a diffusion model.

    def put(self, stats: "SpecDecodingStats") -> None:
        """Send along with vLLM's own counts."""
        stats.num_accepted_tokens_per_pos = [getattr(self, name) for name in _NUMBERS]
        stats.num_draft_tokens_per_pos = [n for pair in self.finished for n in pair]

    @classmethod
    def get(cls, stats: "SpecDecodingStats") -> "StepCounts":
        """What `put` put."""
        flat = stats.num_draft_tokens_per_pos
        numbers = dict(zip(_NUMBERS, stats.num_accepted_tokens_per_pos, strict=True))
        return cls(**numbers, finished=list(zip(flat[::2], flat[1::2], strict=True)))


_NUMBERS = (
    "forwards",
    "processed",
    "committed",
    "output",
    "active",
    "semi",
    "dropped",
    "nonfinite",
    "open_blocks",
)
