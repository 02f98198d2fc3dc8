# SPDX-License-Identifier: Apache-2.0
"""Configs of the two model families, read from official checkpoints without remote code.

Both describe a stock stack under another name: Dream is Qwen2, LLaDA is Llama with OLMo's field
names. What the stock stack does not implement is refused by the field's name instead of ignored.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import LlamaConfig, Qwen2Config

from vllm_d2f.models.checks import (
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INTERMEDIATE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    check_equal,
    check_int,
    check_number,
    check_token_id,
)

__all__ = ["DreamConfig", "LLaDAConfig"]


class _D2FConfigMixin:
    """What the two configs share: bounds, the mask token, the `d2f` section."""

    logits_shift: ClassVar[bool]
    published_mask_token_id: ClassVar[int]
    # End tokens that config.json does not list; each counts if the vocabulary holds it.
    extra_end_token_ids: ClassVar[tuple[int, ...]] = ()

    # Declared by the transformers config that follows in the class's bases.
    attribute_map: ClassVar[dict[str, str]]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    mask_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_id: int | list[int] | None

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every token id that ends an output, without repetition."""
        eos = self.eos_token_id
        listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
        extra = [token for token in self.extra_end_token_ids if token < self.vocab_size]
        return tuple(dict.fromkeys([*listed, *extra]))

    def _name(self, field: str) -> str:
        """The name under which the family's config.json carries `field`, for messages."""
        return next((own for own, name in self.attribute_map.items() if name == field), field)

    def _check_sizes(self) -> None:
        """Bound every size. Must run before transformers' own set-up, which loops over layers."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for field, low, high in (
            ("vocab_size", 2, MAX_VOCAB),
            ("hidden_size", 1, MAX_HIDDEN),
            ("intermediate_size", 1, MAX_INTERMEDIATE),
            ("num_hidden_layers", 1, MAX_LAYERS),
            ("num_attention_heads", 1, MAX_HEADS),
            ("num_key_value_heads", 1, MAX_HEADS),
            ("max_position_embeddings", 1, MAX_POSITIONS),
        ):
            check_int(self._name(field), getattr(self, field), low, high)
        check_number(self._name("rms_norm_eps"), self.rms_norm_eps, 0.0, 1.0)
        check_equal(self._name("hidden_act"), self.hidden_act, "silu", "the MLP is SwiGLU")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"config.json: {self._name('hidden_size')} {self.hidden_size} must be an even "
                f"multiple of {self._name('num_attention_heads')} {heads} (rotary embedding pairs "
                f"the channels of a head)"
            )
        if heads % kv_heads:
            raise ValueError(
                f"config.json: {self._name('num_attention_heads')} {heads} must be a multiple of "
                f"{self._name('num_key_value_heads')} {kv_heads}"
            )

    def _check_tokens(self) -> None:
        """Token ids must index the vocabulary; a missing mask token takes the published id."""
        if self.mask_token_id is None:
            if self.published_mask_token_id >= self.vocab_size:
                raise ValueError(
                    f"config.json: mask_token_id is missing and the published id "
                    f"{self.published_mask_token_id} is outside vocab_size {self.vocab_size}"
                )
            self.mask_token_id = self.published_mask_token_id
        for name in ("mask_token_id", "bos_token_id", "pad_token_id", "eos_token_id"):
            check_token_id(name, getattr(self, name), self.vocab_size)
        if self.mask_token_id in self.end_token_ids:
            raise ValueError(
                f"config.json: mask_token_id {self.mask_token_id} is also an end token"
            )

    def _check_rope(self, rope_parameters: Any, extra: dict[str, Any]) -> None:
        """Only plain rotary embedding: no published checkpoint scales it."""
        section = "rope_scaling" if extra.get("rope_scaling") is not None else "rope_parameters"
        parameters = extra.get("rope_scaling")
        parameters = rope_parameters if parameters is None else parameters
        if parameters is not None:
            if not isinstance(parameters, dict):
                raise ValueError(f"config.json: {section} must be an object or null")
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            check_equal(f"{section}.rope_type", kind, "default", "rotary embedding is not scaled")
            unknown = parameters.keys() - {"rope_type", "type", "rope_theta"}
            if unknown:
                raise ValueError(
                    f"config.json: {section} has entries that are not supported: "
                    f"{', '.join(sorted(map(str, unknown)))[:200]}"
                )
            if "rope_theta" in parameters:
                check_number(f"{section}.rope_theta", parameters["rope_theta"], 0.0, 1e12)
        if "rope_theta" in extra:
            check_number("rope_theta", extra["rope_theta"], 0.0, 1e12)
        _take(extra, "partial_rotary_factor", (None, 1, 1.0), "every channel is rotated")

    def _check_common_extra(self, extra: dict[str, Any]) -> None:
        """Fields of neither family that vLLM's layers would act on."""
        # The remote classes this names must not be reachable from a config of ours.
        extra.pop("auto_map", None)
        # vLLM reads `is_causal: false` as "encoder without a KV cache". Here every batch says
        # what each of its sequences may see, so the field has nothing left to decide.
        extra.pop("is_causal", None)
        if (layer_types := getattr(self, "layer_types", None)) is None:
            layer_types = extra.pop("layer_types", None)
        if layer_types is not None and (
            not isinstance(layer_types, list)
            or layer_types != ["full_attention"] * self.num_hidden_layers
        ):
            raise ValueError(
                "config.json: layer_types must be 'full_attention' for each of the "
                f"{self.num_hidden_layers} layers"
            )


def _take(extra: dict[str, Any], name: str, allowed: tuple[Any, ...], why: str) -> None:
    """Drop field `name` if it has a value that changes nothing; refuse any other value."""
    if name not in extra:
        return
    value = extra.pop(name)
    if not any(type(value) is type(item) and value == item for item in allowed):
        raise ValueError(f"config.json: {name} = {value!r:.80} is not supported ({why})")


@strict
class DreamConfig(_D2FConfigMixin, Qwen2Config):
    """`model_type: "Dream"`: Qwen2's layout with a mask token and shifted logits."""

    model_type = "Dream"
    # Position i is predicted by the output at i - 1, as in the AR model Dream was made from.
    logits_shift: ClassVar[bool] = True
    published_mask_token_id: ClassVar[int] = 151666

    vocab_size: int = 152064
    max_position_embeddings: int = 131072
    mask_token_id: int | None = None
    # Untouched: `vllm_d2f.settings` checks it.
    d2f: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        self._check_rope(self.rope_parameters, kwargs)
        self._check_common_extra(kwargs)
        check_equal("use_sliding_window", self.use_sliding_window, False, "attention is full")
        _take(kwargs, "qk_norm", (None, False), "queries and keys are not normalised")
        _take(kwargs, "dual_chunk_attention_config", (None,), "attention is full")
        _take(kwargs, "head_dim", (None, self.hidden_size // self.num_attention_heads), "derived")
        super().__post_init__(**kwargs)
        self._check_tokens()


# OLMo's field names, which LLaDA's config.json uses -> Llama's.
_LLAMA_NAME_OF = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "activation_type": "hidden_act",
    "weight_tying": "tie_word_embeddings",
}

# OLMo's switches -> the values that describe a Llama stack. Null is OLMo's "off".
_LLAMA_SWITCHES: dict[str, tuple[tuple[Any, ...], str]] = {
    "alibi": ((False, None), "positions are rotary"),
    "rope": ((True,), "positions are rotary"),
    "block_type": (("llama",), "only the Llama block is implemented"),
    "block_group_size": ((1, None), "blocks are not grouped"),
    "include_bias": ((False, None), "no layer has a bias"),
    "include_qkv_bias": ((False, None), "no layer has a bias"),
    "attention_layer_norm": ((False, None), "queries and keys are not normalised"),
    "input_emb_norm": ((False, None), "embeddings are not normalised"),
    "layer_norm_type": (("rms",), "the norm is RMSNorm"),
    "layer_norm_with_affine": ((True,), "the norm has a weight"),
    "bias_for_layer_norm": ((False, None), "the norm has no bias"),
    "multi_query_attention": ((False, None), "give n_kv_heads instead"),
    "scale_logits": ((False, None), "logits are not scaled"),
    "clip_qkv": ((None,), "queries, keys and values are not clipped"),
    # Llama's and vLLM's own switches, should a converted checkpoint carry them.
    "bias": ((False, None), "no layer has a bias"),
    "qkv_bias": ((False, None), "no layer has a bias"),
    "logit_scale": ((None, 1, 1.0), "logits are not scaled"),
    "sliding_window": ((None,), "attention is full"),
}

# OLMo's fields that matter for training only.
_TRAINING_ONLY = (
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "embedding_dropout",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "init_std",
    "precision",
    "residual_dropout",
    "rope_full_precision",
)


@strict
class LLaDAConfig(_D2FConfigMixin, LlamaConfig):
    """`model_type: "llada"`: the Llama layout under OLMo's field and tensor names."""

    model_type = "llada"
    logits_shift: ClassVar[bool] = False
    published_mask_token_id: ClassVar[int] = 126336
    # <|eot_id|>, which ends a turn of the instruct model; config.json names <|endoftext|> only.
    extra_end_token_ids: ClassVar[tuple[int, ...]] = (126348,)
    attribute_map: ClassVar[dict[str, str]] = _LLAMA_NAME_OF

    vocab_size: int = 126464
    intermediate_size: int = 12288
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    # Untouched: `vllm_d2f.settings` checks it.
    d2f: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._adopt_olmo_names(kwargs)
        self._check_sizes()
        self._check_rope(self.rope_parameters, kwargs)
        self._check_common_extra(kwargs)
        for name, (allowed, why) in _LLAMA_SWITCHES.items():
            _take(kwargs, name, allowed, why)
        for name in _TRAINING_ONLY:
            kwargs.pop(name, None)
        check_equal("attention_bias", self.attention_bias, False, "no layer has a bias")
        check_equal("mlp_bias", self.mlp_bias, False, "no layer has a bias")
        if self.head_dim is not None:
            derived = self.hidden_size // self.num_attention_heads
            check_equal("head_dim", self.head_dim, derived, "derived from the other sizes")
        super().__post_init__(**kwargs)
        self._check_tokens()

    def _adopt_olmo_names(self, kwargs: dict[str, Any]) -> None:
        """Move OLMo's fields to Llama's names, before anything is derived from them."""
        mlp_ratio = kwargs.pop("mlp_ratio", None)
        if kwargs.get("mlp_hidden_size", 0) is None:
            # OLMo's default when the size is null.
            d_model = check_int("d_model", kwargs.get("d_model"), 1, MAX_HIDDEN)
            kwargs["mlp_hidden_size"] = check_int("mlp_ratio", mlp_ratio, 1, 1024) * d_model
        for olmo_name, llama_name in _LLAMA_NAME_OF.items():
            if olmo_name not in kwargs:
                continue
            value = kwargs.pop(olmo_name)
            try:
                setattr(self, llama_name, value)
            except StrictDataclassFieldValidationError as error:
                raise ValueError(
                    f"config.json: {olmo_name} = {value!r:.80} has the wrong type"
                ) from error
        embedding_size = kwargs.pop("embedding_size", None)
        if embedding_size is not None:
            # More rows than tokens would put logits of no token into the softmax.
            check_equal("embedding_size", embedding_size, self.vocab_size, "equals vocab_size")
