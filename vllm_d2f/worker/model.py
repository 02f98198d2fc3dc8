# SPDX-License-Identifier: Apache-2.0
"""The classes that vLLM builds: a family's stack of layers with what the engine asks of it.

vLLM looks up `vllm_d2f.worker.model:ARCHITECTURE`; the class is made at the first look.

Shape suffixes: N rows, H hidden size, V vocabulary (of one rank, where it is split).
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_d2f.models import FAMILIES
from vllm_d2f.models.family import Family
from vllm_d2f.worker.model_state import D2FModelState
from vllm_d2f.worker.padded_attention import pad_heads


class D2FModel:
    """Mixin that comes before a vLLM causal LM in a class's bases."""

    family: ClassVar[Family]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        pad_heads(self, vllm_config)  # type: ignore[arg-type]

    @staticmethod
    def get_model_state_cls() -> type[D2FModelState]:
        """Return the class of the model state that vLLM's runner makes."""
        return D2FModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under the checkpoint's names; the stack's own names pass unchanged."""
        renamed = ((self.family.to_stack(name), tensor) for name, tensor in weights)
        return super().load_weights(renamed)  # type: ignore[misc]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the hidden states as they are.

        vLLM's runner calls this on every row of a window. The sampler knows which rows are still
        masked, picks those and calls `project`, so no logits are made for decoded positions.
        """
        return hidden_states

    def project(self, hidden_NH: Tensor) -> Tensor:
        """Apply the language-model head: hidden states of the wanted rows -> logits.

        With tensor parallelism every rank must call it on the same rows, as it gathers the shards.
        """
        return super().compute_logits(hidden_NH)  # type: ignore[misc]

    def project_shard(self, hidden_NH: Tensor) -> Tensor:
        """Return the head's logits of this rank's part of the vocabulary, without its padding."""
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


def __getattr__(architecture: str) -> Any:
    """Return the class of a family, kept in this module once it is made."""
    family = FAMILIES.get(architecture)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {architecture!r}")
    module, _, name = family.stack.partition(":")
    stack = getattr(import_module(module), name)
    # vLLM reads the mapper for quantization configs, which name modules of the checkpoint.
    own = getattr(stack, "hf_to_vllm_mapper", None) or WeightsMapper()
    mapper = WeightsMapper(orig_to_new_regex=dict(family.patterns)) | own
    members = {"family": family, "hf_to_vllm_mapper": mapper, "__module__": __name__}
    made = type(architecture, (D2FModel, stack), members)
    globals()[architecture] = made
    return made
