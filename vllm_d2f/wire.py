# SPDX-License-Identifier: Apache-2.0
"""What worker and scheduler tell each other, and in which field of vLLM it travels.

vLLM runs its scheduler and its worker in two processes and sends a fixed set of fields between
them. D2F needs no field of its own, because a diffusion model leaves some of vLLM's fields unused:

| field of vLLM | from, to | what D2F sends in it |
|---|---|---|
| `spec_token_ids`, `draft_tokens` | worker, scheduler, worker | the open blocks |
| `has_structured_output_reqs` | worker | true: the worker sends its draft tokens back |
| `logits` after `compute_logits` | worker | the hidden states, see `worker.model.D2FModel` |
| `InputBatch.logits_indices` | worker | a slice over all rows of the forward |
| `num_nans_in_logits` | worker, scheduler | `StepStats`, and with async scheduling a trace |
| `num_accepted_tokens_per_pos`, `num_draft_tokens_per_pos` | scheduler, server | `DecodingStats` |
| `Request.spec_decode_metrics` | scheduler, server | the number of forwards of a request |
| `kv_transfer_params` of an output | scheduler, server | the trace of a request (`d2f_trace`) |
| `structured_outputs._backend` | scheduler, worker | the backend that compiled the grammar |
| `hf_config.d2f_step_seconds` | worker, scheduler | what a step costs, measured at start-up |
| `Scheduler._pause_state` | scheduler | no admission while a preempted request is in flight |

This file packs and unpacks the fields that carry something else than their name says. It imports
no vLLM.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.spec_decode.metrics import SpecDecodingStats
    from vllm.v1.structured_output import StructuredOutputManager

STEP_SECONDS = "d2f_step_seconds"
"""Attribute of the model's config: positions of a step -> seconds."""

BITS = 13
"""Bits of each counter of `StepStats`. A window has at most 2^12 positions (`MAX_WINDOW`)."""

NONFINITE = 4 * BITS
"""Bit at which `nonfinite` begins. It takes the rest of an int64 and saturates."""

MAX_NONFINITE = (1 << (63 - NONFINITE)) - 1

Count = TypeVar("Count", int, Tensor)


class StepStats(NamedTuple):
    """Counters of one denoising step of one request.

    The worker packs them into one int64, which vLLM carries per request from the sampler to the
    scheduler as the request's count of NaN logits. A D2F sampler hands no logits to vLLM in which
    it could count NaNs, so the field is free.

    Attributes:
        active: positions decoded in fully activated blocks.
        semi: positions decoded in semi-activated blocks.
        dropped: open blocks that an end token made superfluous.
        open: positions of the window that goes into the next forward.
        nonfinite: proposals without a probability, because their logits held a NaN or an infinity;
            at most `MAX_NONFINITE`.
    """

    active: int = 0
    semi: int = 0
    dropped: int = 0
    open: int = 0
    nonfinite: int = 0

    @staticmethod
    def pack(active: Count, semi: Count, dropped: Count, open_: Count, nonfinite: Count) -> Count:
        """Return the counters as one integer, or as an int64 tensor of one per request."""
        if isinstance(nonfinite, Tensor):
            nonfinite = nonfinite.clamp(max=MAX_NONFINITE)
        else:
            nonfinite = min(nonfinite, MAX_NONFINITE)
        packed = active + (semi << BITS) + (dropped << (2 * BITS)) + (open_ << (3 * BITS))
        return packed + (nonfinite << NONFINITE)

    @classmethod
    def unpack(cls, packed: int) -> "StepStats":
        """Return the counters of an integer that `pack` made."""
        mask = (1 << BITS) - 1
        return cls(
            active=packed & mask,
            semi=packed >> BITS & mask,
            dropped=packed >> (2 * BITS) & mask,
            open=packed >> (3 * BITS) & mask,
            nonfinite=packed >> NONFINITE,
        )


@dataclass(slots=True)
class DecodingStats:
    """What the scheduler has counted since its last report to the server's metrics.

    Attributes:
        forwards and others: `metrics.COUNTERS` says what each of them counts.
        open_blocks: blocks that are open now, over all requests.
        finished: tokens and forwards of each finished request.
    """

    forwards: int = 0
    processed: int = 0
    committed: int = 0
    output: int = 0
    active: int = 0
    semi: int = 0
    dropped: int = 0
    nonfinite: int = 0
    submitted: int = 0
    withheld: int = 0
    open_blocks: int = 0
    finished: list[tuple[int, int]] = field(default_factory=list)

    def add(self, committed: int, output: int, stats: StepStats) -> None:
        """Count one denoising step of one request."""
        self.forwards += 1
        self.committed += committed
        self.output += output
        self.active += stats.active
        self.semi += stats.semi
        self.dropped += stats.dropped
        self.nonfinite += stats.nonfinite

    def finish(self, tokens: int, forwards: int) -> None:
        """Count a finished request, unless it ended before its first denoising step."""
        if forwards:
            self.finished.append((tokens, forwards))

    def to_vllm(self, stats: "SpecDecodingStats") -> None:
        """Write the counters into the two lists per draft position, which D2F leaves empty."""
        stats.num_accepted_tokens_per_pos = [getattr(self, name) for name in _COUNTERS]
        stats.num_draft_tokens_per_pos = [n for pair in self.finished for n in pair]

    @classmethod
    def from_vllm(cls, stats: "SpecDecodingStats") -> "DecodingStats":
        """Read what `to_vllm` wrote."""
        flat = stats.num_draft_tokens_per_pos
        counters = dict(zip(_COUNTERS, stats.num_accepted_tokens_per_pos, strict=True))
        return cls(**counters, finished=list(zip(flat[::2], flat[1::2], strict=True)))


_COUNTERS = [f.name for f in fields(DecodingStats) if f.name != "finished"]


GRAMMAR_BACKENDS = {
    "XgrammarBackend": "xgrammar",
    "GuidanceBackend": "guidance",
    "OutlinesBackend": "outlines",
    "LMFormatEnforcerBackend": "lm-format-enforcer",
}
"""Names of vLLM's structured output backends by class. An engine has one."""


def send_grammar_backend(manager: "StructuredOutputManager", params: "SamplingParams") -> None:
    """Write the backend that compiled a request's grammar into the request, for the worker."""
    if params.structured_outputs is not None:
        params.structured_outputs._backend = GRAMMAR_BACKENDS[type(manager.backend).__name__]
