# SPDX-License-Identifier: Apache-2.0
"""The model families that D2F serves, and their registration with transformers and vLLM.

Importing this package imports no vLLM. A family is one file here and one entry in the loop below;
another package adds its own with `vllm_d2f.register(FAMILY)`.
"""

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from vllm_d2f.models import adapted, dream, fast_dllm_v2, llada, llada2, sdar, stable_diffcoder
from vllm_d2f.models.family import Family, Published

__all__ = ["FAMILIES", "PRESETS", "PUBLISHED", "add_family", "family_config", "register_configs"]

FAMILIES: dict[str, Family] = {}
"""The `architectures` entry of a checkpoint's config.json -> its family."""

PRESETS: dict[str, dict[str, Any]] = {}
"""Published settings by name, for `{"d2f": {"preset": NAME}}` and a request's `d2f_preset`."""

PUBLISHED: dict[str, Published] = {}
"""Published models by the name that `vllm serve` takes."""


def add_family(family: Family) -> None:
    """Add a family to the tables above, or replace the one of the same architecture."""
    FAMILIES[family.architecture] = family
    PRESETS.update(zip(family.preset_names, map(dict, family.presets.values()), strict=True))
    PUBLISHED.update(family.published)


def register_configs() -> None:
    """Register every `model_type` with transformers, so that none needs `trust_remote_code`.

    Safe to call more than once.
    """
    for family in FAMILIES.values():
        AutoConfig.register(family.model_type, family.config, exist_ok=True)
        if family.tokenizer is not None:
            AutoTokenizer.register(
                family.config, fast_tokenizer_class=family.tokenizer, exist_ok=True
            )


def family_config(config: Any) -> Any:
    """Return the family's own config for a checkpoint that says another `model_type`.

    A config of any other class or `model_type` is returned as it is.

    Raises:
        ValueError: a field that the family's layers do not implement.
    """
    family = FAMILIES.get((config.architectures or [""])[0])
    if family is None or config.model_type not in family.other_model_types:
        return config
    fields = config.to_dict()
    for name in ("model_type", "logits_shift"):  # what is known by the other model_type
        fields.pop(name, None)
    fields.setdefault("head_dim", config.hidden_size // config.num_attention_heads)
    return family.config.from_dict(fields)


_OURS = (dream.FAMILY, llada.FAMILY, *sdar.FAMILIES, llada2.FAMILY, fast_dllm_v2.FAMILY)
for _family in (*_OURS, stable_diffcoder.FAMILY, *adapted.FAMILIES):
    add_family(_family)
