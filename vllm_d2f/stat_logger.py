# SPDX-License-Identifier: Apache-2.0
"""D2F's metrics on the server's `/metrics`, through vLLM's plug-in point for stat loggers.

Prefix cache hits, time to first token and all that is not special to D2F are vLLM's own metrics.
"""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_d2f.patches import p08_request_fields, p10_exit_status, p11_streamed_input
from vllm_d2f.settings import is_d2f, served_settings
from vllm_d2f.wire import DecodingStats

LABELS = ("model_name", "engine")

COUNTERS = {
    "forwards": ("vllm:d2f_forwards", "Denoising forwards, one per request and step."),
    "processed": (
        "vllm:d2f_processed_tokens",
        "Positions that went through the model, prompts included.",
    ),
    "committed": (
        "vllm:d2f_committed_tokens",
        "Positions whose keys and values became final.",
    ),
    "output": ("vllm:d2f_output_tokens", "Tokens that left the engine."),
    "active": (
        "vllm:d2f_fully_activated_accepts",
        "Positions decided in fully activated blocks.",
    ),
    "semi": ("vllm:d2f_semi_activated_accepts", "Positions decided in semi-activated blocks."),
    "dropped": ("vllm:d2f_dropped_blocks", "Open blocks given up behind an end token."),
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
TOKENS_PER_FORWARD = (
    "vllm:d2f_tokens_per_forward",
    "Tokens of a finished request, divided by its forwards.",
)
BUCKETS = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6, 8, 12, 16, 32)


class D2FStatLogger(AggregateStatLoggerBase):
    """Counts for models of this package; for any other it does nothing."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.model_config = vllm_config.model_config
        self.engine_indexes = engine_indexes
        self.counters: dict[str, dict[int, Any]] = {}
        if is_d2f(self.model_config):
            # Only a server's process makes a logger, and what these change exists only there.
            p08_request_fields.install(vllm_config)
            p10_exit_status.install()
            p11_streamed_input.install()

    def log_engine_initialized(self) -> None:
        # Not earlier: vLLM's own logger is made later and begins with unregistering all `vllm:`.
        if not is_d2f(self.model_config):
            return

        def per_engine(metric: Any) -> dict[int, Any]:
            model = self.model_config.served_model_name
            return {i: metric.labels(model, str(i)) for i in self.engine_indexes}

        self.open_blocks = per_engine(Gauge(*OPEN_BLOCKS, LABELS, multiprocess_mode="mostrecent"))
        self.tokens_per_forward = per_engine(
            Histogram(*TOKENS_PER_FORWARD, LABELS, buckets=BUCKETS)
        )
        simulated = served_settings(self.model_config).simulate_tokens_per_forward
        if simulated is not None:
            gauge = Gauge(*SIMULATED, LABELS, multiprocess_mode="mostrecent")
            for metric in per_engine(gauge).values():
                metric.set(simulated)
        self.counters = {
            field: per_engine(Counter(name, text, LABELS))
            for field, (name, text) in COUNTERS.items()
        }

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if stats is None or not self.counters:
            return
        counts = DecodingStats.from_vllm(stats)
        for field, counter in self.counters.items():
            counter[engine_idx].inc(getattr(counts, field))
        self.open_blocks[engine_idx].set(counts.open_blocks)
        for tokens, forwards in counts.finished:
            self.tokens_per_forward[engine_idx].observe(tokens / forwards)
