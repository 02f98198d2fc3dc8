# SPDX-License-Identifier: Apache-2.0
"""The cost of decoding: the trace of one request, and D2F's metrics on a server's `/metrics`.

vLLM's own metrics already cover what is not special to D2F, such as prefix cache hits and the time
to first token. Importing this file imports no vLLM.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_d2f.patches import apply
from vllm_d2f.settings import is_d2f, served_settings
from vllm_d2f.wire import DecodingStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

    D2FStatLogger: type


def denoising_forwards(output: "CompletionOutput") -> int:
    """Return the number of forwards that denoised the request's window.

    The first of them usually prefills the prompt too. A forward that only prefills, because the
    batch was full or the request was preempted, does not count.

    Raises:
        ValueError: the output is not finished, or not from a D2F model.
    """
    metrics = output.spec_decode_metrics
    if metrics is None:
        raise ValueError("no counters on this output: it is unfinished or not from a D2F model")
    return sum(metrics.histogram)


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """What a request with the option `d2f_trace` returns beside its answer.

    Attributes:
        forwards: denoising forwards so far.
        tokens_per_forward: tokens emitted so far, divided by `forwards`.
        decided_at: for each token of the answer, the number of the forward that decoded it; the
            first forward is 1. The list is longer than the answer where a stop string ended the
            answer in the middle of the tokens of a forward.
        widths: with an adaptive window, the positions of it that each forward computed;
            `reference.decode` gives the same answer when it takes them.
    """

    forwards: int
    tokens_per_forward: float
    decided_at: list[int]
    widths: list[int] | None = None


def request_trace(output: "RequestOutput") -> RequestTrace:
    """Return the trace of an output. Over HTTP it is the response's `kv_transfer_params.d2f`.

    Raises:
        ValueError: the request did not ask for it.
    """
    params = output.kv_transfer_params or {}
    if "d2f" not in params:
        raise ValueError(
            'this output has no trace; ask with SamplingParams(extra_args={"d2f_trace": 1})'
        )
    return RequestTrace(**params["d2f"])


LABELS = ("model_name", "engine")

COUNTERS = {
    "forwards": ("vllm:d2f_forwards", "Denoising forwards, one per request and step."),
    "processed": ("vllm:d2f_processed_tokens", "Positions that the model computed, with prompts."),
    "committed": ("vllm:d2f_committed_tokens", "Positions whose keys and values became final."),
    "output": ("vllm:d2f_output_tokens", "Tokens that the engine emitted."),
    "active": ("vllm:d2f_fully_activated_accepts", "Positions decoded in fully activated blocks."),
    "semi": ("vllm:d2f_semi_activated_accepts", "Positions decoded in semi-activated blocks."),
    "dropped": ("vllm:d2f_dropped_blocks", "Open blocks given up behind an end token."),
    "submitted": ("vllm:d2f_window_positions", "Positions of windows that went into forwards."),
    "withheld": (
        "vllm:d2f_withheld_positions",
        "Positions of open blocks that the adaptive window left out of forwards.",
    ),
    "nonfinite": (
        "vllm:d2f_nonfinite_proposals",
        "Proposals from logits with a NaN or infinity: the model or its weights are broken.",
    ),
}
"""Field of `DecodingStats` -> name and documentation; Prometheus appends `_total`."""

OPEN_BLOCKS = ("vllm:d2f_open_blocks", "Blocks open now, of all requests.")
SIMULATED = (
    "vllm:d2f_simulated_tokens_per_forward",
    "Acceptance is simulated (else this is not there): text and scores mean nothing.",
)
TOKENS_PER_FORWARD = ("vllm:d2f_tokens_per_forward", "Tokens per forward of a finished request.")
BUCKETS = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6, 8, 12, 16, 32)


class _StatLogger:
    """Records `DecodingStats` for models of this package, and nothing for any other model."""

    def __init__(self, vllm_config: "VllmConfig", engine_indexes: list[int]) -> None:
        self.model_config = vllm_config.model_config
        self.engine_indexes = engine_indexes
        self.counters: dict[str, dict[int, Any]] = {}
        if is_d2f(self.model_config):
            # vLLM makes stat loggers in the server's process only, which these patches change.
            apply("server", vllm_config)

    def log_engine_initialized(self) -> None:
        # In __init__ it would be too early: vLLM makes its own logger later, and that one begins
        # by unregistering every metric whose name starts with `vllm:`.
        if not is_d2f(self.model_config):
            return
        from prometheus_client import Counter, Gauge, Histogram

        def per_engine(metric: Any) -> dict[int, Any]:
            model = self.model_config.served_model_name
            return {i: metric.labels(model, str(i)) for i in self.engine_indexes}

        self.open_blocks = per_engine(Gauge(*OPEN_BLOCKS, LABELS, multiprocess_mode="mostrecent"))
        histogram = Histogram(*TOKENS_PER_FORWARD, LABELS, buckets=BUCKETS)
        self.tokens_per_forward = per_engine(histogram)
        simulated = served_settings(self.model_config).simulate_tokens_per_forward
        if simulated is not None:
            gauge = Gauge(*SIMULATED, LABELS, multiprocess_mode="mostrecent")
            for metric in per_engine(gauge).values():
                metric.set(simulated)
        self.counters = {k: per_engine(Counter(*v, LABELS)) for k, v in COUNTERS.items()}

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: "IterationStats | None",
        mm_cache_stats: "MultiModalCacheStats | None" = None,
        engine_idx: int = 0,
    ) -> None:
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if stats is None or not self.counters:
            return
        decoding = DecodingStats.from_vllm(stats)
        for field, counter in self.counters.items():
            counter[engine_idx].inc(getattr(decoding, field))
        self.open_blocks[engine_idx].set(decoding.open_blocks)
        for tokens, forwards in decoding.finished:
            self.tokens_per_forward[engine_idx].observe(tokens / forwards)


def __getattr__(name: str) -> Any:
    """Make `D2FStatLogger` when vLLM loads it: its base class is the only thing that needs vLLM."""
    if name != "D2FStatLogger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    bases = (_StatLogger, AggregateStatLoggerBase)
    logger = type(name, bases, {"__module__": __name__, "__doc__": _StatLogger.__doc__})
    globals()[name] = logger
    return logger
