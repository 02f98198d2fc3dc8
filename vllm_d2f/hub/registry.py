# SPDX-License-Identifier: Apache-2.0
"""The published D2F models: which base and adapter a name stands for, and how it decodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MODELS", "Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name stands for.

    Attributes:
        about: one line for the list of models.
        base, adapter: repositories on the Hub.
        base_revision, adapter_revision: branch, tag or commit; None is the main branch.
        architecture: the only entry allowed in the base's `architectures`.
        variant: "base" or "instruct": which of the family's checkpoints the adapter was trained on.
        d2f: the `d2f` section that the merged config.json gets.
        presets: names for `--additional-config '{"d2f": {"preset": NAME}}'`, published for it.
        context: tokens a server takes unless `--max-model-len` says more; None leaves it to the
            base's config.json.
        gigabytes: size of base and adapter, for messages.
    """

    about: str
    base: str
    adapter: str
    architecture: str
    variant: str
    gigabytes: float
    d2f: Mapping[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = ()
    context: int | None = None
    base_revision: str | None = None
    adapter_revision: str | None = None


_TASKS = ("gsm8k", "mbpp", "math", "humaneval")

MODELS: dict[str, Entry] = {
    "d2f-dream-7b": Entry(
        about="D2F-Dream-Base-7B",
        base="Dream-org/Dream-v0-Base-7B",
        adapter="SJTU-Deng-Lab/D2F_Dream_Base_7B_Lora",
        architecture="DreamModel",
        variant="base",
        gigabytes=15.3,
        d2f={"preset": "dream-gsm8k"},
        presets=tuple(f"dream-{task}" for task in _TASKS),
        # Dream was adapted from Qwen2.5 at this length; its config.json still says 131072, which
        # would size a server for prompts that the model cannot answer.
        context=2048,
    ),
    "d2f-llada-8b": Entry(
        about="D2F-LLaDA-8B-Instruct",
        base="GSAI-ML/LLaDA-8B-Instruct",
        adapter="SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora",
        architecture="LLaDAModelLM",
        variant="instruct",
        gigabytes=16.1,
        d2f={"preset": "llada-gsm8k"},
        presets=tuple(f"llada-{task}" for task in _TASKS),
    ),
}
