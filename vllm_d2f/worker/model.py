# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a D2F model, beside what vLLM asks of any model."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["D2FModel"]


class D2FModel:
    """Mixin that comes before a vLLM causal LM in a class's bases."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        from vllm_d2f.worker.padded_attention import pad_heads

        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        pad_heads(self, vllm_config)  # type: ignore[arg-type]

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's runner takes its model state from here. Imported late: it imports the engine."""
        from vllm_d2f.worker.model_state import D2FModelState

        return D2FModelState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the hidden states as they are.

        vLLM's runner calls this on every row of a window. The sampler knows which rows are still
        masked, picks those and calls `project`, so no logits are made for decided positions.
        """
        return hidden_states

    def project(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The language-model head: hidden states of the wanted rows -> logits of the vocabulary.

        With tensor parallelism every rank must call it on the same rows, as it gathers the shards.
        """
        return super().compute_logits(hidden_NH)  # type: ignore[misc]

    def project_shard(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The head's logits of this rank's part of the vocabulary, without its padding."""
        processor, head = self.logits_processor, self.lm_head  # type: ignore[attr-defined]
        logits_NV = processor(head, hidden_NH, skip_gather=True)
        return logits_NV[:, : head.shard_indices.num_org_elements]

    @property
    def first_token(self) -> int:
        """The id of the first token of this rank's part of the vocabulary."""
        return self.lm_head.shard_indices.org_vocab_start_index  # type: ignore[attr-defined]

    @property
    def compute_logits_local(self) -> None:
        """Absent on purpose: `hasattr` is False.

        vLLM's batch-sharded sampling asks for it and would then split the rows of a window over
        ranks behind the sampler's back. Without it vLLM says so and samples on every rank.
        """
        raise AttributeError("compute_logits_local: D2F samples the same rows on every rank")
