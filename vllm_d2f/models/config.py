# SPDX-License-Identifier: Apache-2.0
"""The checks of every family's config.json, before its numbers allocate memory or bound a loop.

A checkpoint comes from a stranger: sizes are bounded, token ids must index the vocabulary, and a
field that the stack of layers does not implement is refused by its name instead of ignored.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.errors import StrictDataclassFieldValidationError

from vllm_d2f.models.family import Family

__all__ = ["MAX_SIZES", "D2FConfig", "Switches", "check_equal", "check_experts", "check_int"]

Switches = dict[str, tuple[tuple[Any, ...], str]]
"""Field of config.json -> the values that change nothing, and why others are refused."""

# Far above the largest published models, and small enough that a wrong number cannot exhaust the
# machine before the first weight is read (the rotary cache alone is positions x head size).
MAX_SIZES = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "max_position_embeddings": 1 << 20,
}
MAX_HEAD_DIM = 1024
MAX_END_TOKENS = 64
MAX_EXPERTS = 4096

# Fields that one of the stacks would act on.
_SWITCHES: Switches = {
    "partial_rotary_factor": ((None, 1, 1.0), "every channel is rotated"),
    "sliding_window": ((None,), "attention is full"),
    "use_sliding_window": ((None, False), "attention is full"),
    "dual_chunk_attention_config": ((None,), "attention is full"),
    "qk_norm": ((None, False), "queries and keys are not normalised"),
    "bias": ((None, False), "no layer has a bias"),
    "qkv_bias": ((None, False), "no layer has a bias"),
    "attention_bias": ((None, False), "no layer has a bias"),
    "mlp_bias": ((None, False), "no layer has a bias"),
    "logit_scale": ((None, 1, 1.0), "logits are not scaled"),
}


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` if it is an integer in [low, high]; booleans are not integers here."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"config.json: {name} must be an integer from {low} to {high}, got {value!r:.80}"
        )
    return value


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a `value` that is not a finite number in (low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low < value <= high:
        raise ValueError(
            f"config.json: {name} must be a number above {low:g} and at most {high:g}, "
            f"got {value!r:.80}"
        )


def check_equal(name: str, value: Any, allowed: tuple[Any, ...], why: str) -> None:
    """Refuse a `value` that is none of `allowed`: the stack does not implement it."""
    if not any(type(value) is type(item) and value == item for item in allowed):
        expected = " or ".join(map(repr, allowed))
        raise ValueError(
            f"config.json: {name} = {value!r:.80} is not supported ({why}); expected {expected}"
        )


def check_experts(config: Any, num_experts: str, **more: int) -> None:
    """Check the sizes of a mixture of experts before they allocate memory.

    Args:
        num_experts: the field of config.json that counts them.
        more: further integers of `config`, each with its smallest value.
    """
    experts = check_int(num_experts, getattr(config, num_experts), 1, MAX_EXPERTS)
    check_int("num_experts_per_tok", config.num_experts_per_tok, 1, experts)
    check_int("moe_intermediate_size", config.moe_intermediate_size, 1, 1 << 20)
    for name, low in more.items():
        check_int(name, getattr(config, name), low, max(experts, config.num_hidden_layers))


@dataclass(repr=False, kw_only=True)
class D2FConfig:
    """Base of a family's config, in front of the transformers config of its stack.

    Attributes:
        family: the `Family` that names the class; it sets this.
        free_head_dim: whether `head_dim` may differ from hidden_size / num_attention_heads.
        partial_rotary: whether some channels of a head may be rotated and the others not.
        switches: fields that the family refuses beside those of every family.
        mask_token_id: null takes the family's published one.
        logits_shift: whether the output at i - 1 predicts position i; null takes the family's.
        d2f: how the model decodes; `vllm_d2f.settings` checks it.
    """

    family: ClassVar[Family]
    free_head_dim: ClassVar[bool] = False
    partial_rotary: ClassVar[bool] = False
    switches: ClassVar[Switches] = {}

    mask_token_id: int | None = None
    logits_shift: bool | None = None
    d2f: Any = None

    if TYPE_CHECKING:  # fields of the transformers config that follows in the bases
        attribute_map: ClassVar[dict[str, str]]
        vocab_size: int
        hidden_size: int
        num_hidden_layers: int
        num_attention_heads: int
        num_key_value_heads: Any  # int, in some of them also None
        rms_norm_eps: float
        rope_parameters: Any
        hidden_act: str
        eos_token_id: int | list[int] | None

    def __post_init__(self, **extra: Any) -> None:
        # Before transformers' own set-up, which loops over the layers.
        self.check_layout(extra)
        super().__post_init__(**extra)  # type: ignore[misc]
        self._check_tokens()
        if self.logits_shift is None:
            self.logits_shift = self.family.logits_shift == "previous"

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every token id that ends an output, without repetition."""
        eos = self.eos_token_id
        listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
        extra = [token for token in self.family.extra_end_token_ids if token < self.vocab_size]
        return tuple(dict.fromkeys([*listed, *extra]))

    def check_layout(self, extra: dict[str, Any]) -> None:
        """Refuse what the stack does not implement.

        Args:
            extra: fields of config.json that the transformers config does not declare. Those that
                change nothing are removed.

        Raises:
            ValueError: with the field's name in config.json.
        """
        self._check_sizes(extra)
        self._check_rope(extra)
        # `auto_map` names remote classes, which no config may lead to. vLLM takes
        # `is_causal: false` for an encoder without a KV cache; here each batch says what its
        # sequences may attend to. `attn_implementation` is that of the authors' code.
        for name in ("auto_map", "is_causal", "attn_implementation"):
            extra.pop(name, None)
        if extra.get("use_sliding_window") is False:  # then its size says nothing
            extra.pop("sliding_window", None)
        switches = _SWITCHES | self.switches
        if self.partial_rotary:
            self._check_partial_rotary(extra)
            del switches["partial_rotary_factor"]
        for name, (allowed, why) in switches.items():
            if name in extra:
                check_equal(name, extra.pop(name), allowed, why)
        for name in ("use_sliding_window", "attention_bias", "mlp_bias"):  # some stacks declare it
            check_equal(name, getattr(self, name, False), *_SWITCHES[name])
        if (layer_types := getattr(self, "layer_types", None)) is None:
            layer_types = extra.pop("layer_types", None)
        full = ["full_attention"] * self.num_hidden_layers
        if layer_types is not None and layer_types != full:
            raise ValueError(
                "config.json: layer_types must be 'full_attention' for each of the "
                f"{self.num_hidden_layers} layers"
            )

    def adopt_names(self, extra: dict[str, Any]) -> None:
        """Move fields under the family's own names to the stack's, before anything uses them."""
        for own, name in self.attribute_map.items():
            if own not in extra:
                continue
            value = extra.pop(own)
            try:
                setattr(self, name, value)
            except StrictDataclassFieldValidationError as error:
                raise ValueError(
                    f"config.json: {own} = {value!r:.80} has the wrong type"
                ) from error

    def _name(self, field: str) -> str:
        """Return the name under which the family's config.json carries `field`, for messages."""
        return next((own for own, name in self.attribute_map.items() if name == field), field)

    def _check_sizes(self, extra: dict[str, Any]) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for field, high in MAX_SIZES.items():
            low = 2 if field == "vocab_size" else 1
            check_int(self._name(field), getattr(self, field), low, high)
        check_number(self._name("rms_norm_eps"), self.rms_norm_eps, 0.0, 1.0)
        check_equal(self._name("hidden_act"), self.hidden_act, ("silu",), "the MLP is SwiGLU")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"config.json: {self._name('num_attention_heads')} {heads} must be a multiple of "
                f"{self._name('num_key_value_heads')} {kv_heads}"
            )
        head_dim = extra.pop("head_dim", None) or getattr(self, "head_dim", None)
        if self.free_head_dim and head_dim is not None:
            if check_int("head_dim", head_dim, 2, MAX_HEAD_DIM) % 2:
                raise ValueError(f"config.json: head_dim {head_dim} must be even")
            return
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"config.json: {self._name('hidden_size')} {self.hidden_size} must be an even "
                f"multiple of {self._name('num_attention_heads')} {heads} (rotary embedding pairs "
                f"the channels of a head)"
            )
        if head_dim is not None:
            derived = self.hidden_size // heads
            check_equal("head_dim", head_dim, (derived,), "the other sizes determine it")

    def _check_rope(self, extra: dict[str, Any]) -> None:
        """Refuse a rotary embedding that is scaled; no published checkpoint has one."""
        section, parameters = "rope_scaling", extra.get("rope_scaling")
        if parameters is None:
            section, parameters = "rope_parameters", self.rope_parameters
        if parameters is not None:
            if not isinstance(parameters, dict):
                raise ValueError(f"config.json: {section} must be an object or null")
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            why = "rotary embedding is not scaled"
            check_equal(f"{section}.rope_type", kind, ("default",), why)
            known = {"rope_type", "type", "rope_theta"}
            known |= {"partial_rotary_factor"} if self.partial_rotary else set()
            if unknown := parameters.keys() - known:
                raise ValueError(
                    f"config.json: {section} has entries that are not supported: "
                    f"{', '.join(sorted(map(str, unknown)))[:200]}"
                )
            if "rope_theta" in parameters:
                check_number(f"{section}.rope_theta", parameters["rope_theta"], 0.0, 1e12)
        if "rope_theta" in extra:
            check_number("rope_theta", extra["rope_theta"], 0.0, 1e12)

    def _check_partial_rotary(self, extra: dict[str, Any]) -> None:
        """Check the share of a head's channels that are rotated, in pairs."""
        share = (self.rope_parameters or {}).get("partial_rotary_factor", 0.5)
        share = extra.setdefault("partial_rotary_factor", share)
        check_number("partial_rotary_factor", share, 0.0, 1.0)
        rotated = getattr(self, "head_dim", 0) * share
        if rotated % 2:
            raise ValueError(
                f"config.json: partial_rotary_factor {share} must give an even number of channels, "
                f"not {rotated:g}"
            )
        check_equal("rotary_dim", extra.pop("rotary_dim", None), (None, int(rotated)), "as above")

    def _check_tokens(self) -> None:
        """Check that token ids index the vocabulary; a missing mask token is the published one."""
        if self.mask_token_id is None:
            published = self.family.mask_token_id
            if published is None:
                raise ValueError("config.json: mask_token_id is missing")
            if published >= self.vocab_size:
                raise ValueError(
                    f"config.json: mask_token_id is missing and the published id {published} is "
                    f"outside vocab_size {self.vocab_size}"
                )
            self.mask_token_id = published
        for name in ("mask_token_id", "bos_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = value if isinstance(value, list) else [] if value is None else [value]
            if len(several) > MAX_END_TOKENS:
                raise ValueError(f"config.json: {name} lists more than {MAX_END_TOKENS} tokens")
            for token in several:
                check_int(name, token, 0, self.vocab_size - 1)
        if self.mask_token_id in self.end_token_ids:
            raise ValueError(
                f"config.json: mask_token_id {self.mask_token_id} is also an end token"
            )
