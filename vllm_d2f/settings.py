# SPDX-License-Identifier: Apache-2.0
"""Settings of a served model and of a request: where they come from and what they may be.

Weakest first: package defaults < `d2f` section of `generation_config.json` < of `config.json` <
`--additional-config '{"d2f": {...}}'` < a request's `vllm_xargs`. Nothing is ignored silently:
what is unknown or out of range is an error that names the allowed range.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

from vllm_d2f.d2f import D2FParams
from vllm_d2f.models import FAMILIES, PRESETS
from vllm_d2f.models.family import BlockOrigin, Family, PromptAttention
from vllm_d2f.sampling.logprobs import MODES as LOGPROB_MODES

if TYPE_CHECKING:
    from vllm.config import ModelConfig, StructuredOutputsConfig
    from vllm.sampling_params import SamplingParams

MAX_WINDOW = 4096
"""Widest window a server may be started with, in positions: bounds the state kept per request."""

MAX_END_TOKENS = 8
"""End tokens of a request that close its window early; further ones stop it one block later."""

# Setting -> its default without a family, and its values.
_ATTENTION_RULES = {
    "prompt_attention": ("bidirectional", get_args(PromptAttention)),
    "block_origin": ("prompt_end", get_args(BlockOrigin)),
}

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?")

_PRESET, _TRACE = "d2f_preset", "d2f_trace"
_SIMULATE = "simulate_tokens_per_forward"
_PARAM_NAMES = tuple(f.name for f in fields(D2FParams))


@dataclass(frozen=True, slots=True)
class Settings:
    """How a served model decodes.

    Attributes:
        params: a request's settings unless it says otherwise.
        window: positions of the widest window a request may ask for.
        prompt_attention: "bidirectional" (D2F as published) or "block_causal": the prompt is cut
            into blocks of `params.block_size` from its start, for models trained that way.
        block_origin: where the answer's blocks begin: behind the prompt ("prompt_end"), or at
            multiples of the block size from position 0 on ("zero").
        simulate_tokens_per_forward: for timing a model without its weights (`load_format=dummy`):
            so many positions are accepted per forward and request, left to right, whatever the
            model says. The text means nothing. None: off.
        family: the model family, whose presets a request may name without their beginning.
    """

    params: D2FParams
    window: int
    prompt_attention: str = "bidirectional"
    block_origin: str = "prompt_end"
    simulate_tokens_per_forward: float | None = None
    family: str = ""

    def as_dict(self) -> dict[str, Any]:
        """A JSON form from which `settings_from_dict` makes the same settings."""
        return {
            **asdict(self.params),
            "window": self.window,
            "prompt_attention": self.prompt_attention,
            "block_origin": self.block_origin,
            "simulate_tokens_per_forward": self.simulate_tokens_per_forward,
        }


def settings_from_dict(
    *sections: Mapping[str, Any] | None, family: Family | None = None
) -> Settings:
    """Settings from `d2f` sections, weakest first; at least one must be there.

    Keys: `block_size`, `max_blocks`, `tau_add`, `tau_act`, `tau_conf`, `window` (default
    block_size * max_blocks), `prompt_attention` and `block_origin` (default: those of `family`),
    `preset`, `simulate_tokens_per_forward`.

    Raises:
        ValueError: no section at all, an unknown key, a value out of range.
    """
    if all(section is None for section in sections):
        raise ValueError(_hint())
    merged: dict[str, Any] = {}
    for section in sections:
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ValueError(f"the d2f section must be an object, got {section!r:.80}")
        known = {*_PARAM_NAMES, *_ATTENTION_RULES, "window", "preset", _SIMULATE}
        if unknown := sorted(set(map(str, section)) - known):
            raise ValueError(
                f"d2f: unknown setting {unknown[0]!r:.80}; known are {', '.join(sorted(known))}"
            )
        section = dict(section)
        preset = section.pop("preset", None)
        if preset is not None:
            if preset not in PRESETS:
                raise ValueError(
                    f"d2f: unknown preset {preset!r:.80}; known are {', '.join(PRESETS)}"
                )
            section = PRESETS[preset] | section
        merged |= section
    window = merged.pop("window", None)
    rules: dict[str, Any] = {}
    for name, (default, allowed) in _ATTENTION_RULES.items():
        rules[name] = merged.pop(name, getattr(family, name, default))
        if rules[name] not in allowed:
            raise ValueError(
                f"d2f: {name} must be one of {', '.join(allowed)}, got {rules[name]!r:.80}"
            )
    simulate = merged.pop(_SIMULATE, None)
    try:
        params = D2FParams(**merged)
    except ValueError as error:
        raise ValueError(f"d2f: {error}") from None
    if window is None:
        window = params.window
    if isinstance(window, bool) or not isinstance(window, int):
        raise ValueError(f"d2f: window must be an integer, got {window!r:.80}")
    if not params.window <= window <= MAX_WINDOW:
        raise ValueError(
            f"d2f: window {window} must be between block_size * max_blocks = {params.window} and "
            f"{MAX_WINDOW}"
        )
    if simulate is not None:
        number = isinstance(simulate, (int, float)) and not isinstance(simulate, bool)
        if not number or not 1 <= simulate <= window:
            raise ValueError(
                f"d2f: {_SIMULATE} must be a number in [1, {window}], got {simulate!r}"
            )
    return Settings(
        params,
        window,
        **rules,
        simulate_tokens_per_forward=simulate,
        family=family.name if family else "",
    )


def _hint() -> str:
    return (
        "this checkpoint has no D2F settings. Serve a model distilled with D2F and say how it "
        'decodes, for example --additional-config \'{"d2f": {"block_size": 32, "max_blocks": 4}}\' '
        f'or --additional-config \'{{"d2f": {{"preset": "{next(iter(PRESETS))}"}}}}\' '
        f"(presets: {', '.join(PRESETS)})"
    )


def request_params(settings: Settings, extra_args: Mapping[str, Any] | None) -> D2FParams:
    """A request's settings: the served ones, its `d2f_preset`, its other `d2f_*` options.

    Without a `d2f_max_blocks` of its own, a request with larger blocks gets as many as fit.

    Raises:
        ValueError: an unknown option, a value out of range, a product that does not fit the window.
    """
    given = dict(extra_args or {})
    options = {f"d2f_{name}": name for name in _PARAM_NAMES}
    if unknown := sorted(given.keys() - options.keys() - {_PRESET, _TRACE}):
        known = ", ".join(sorted({*options, _PRESET, _TRACE}))
        raise ValueError(f"unknown option {unknown[0]!r:.80}; {_remedy(unknown[0])} are {known}")
    wants_trace(given)
    base, window = settings.params, settings.window
    preset = _preset(settings, given.pop(_PRESET)) if _PRESET in given else {}
    given.pop(_TRACE, None)
    chosen = asdict(base) | preset | {options[k]: _number(k, v) for k, v in given.items()}
    block_size, max_blocks = chosen["block_size"], chosen["max_blocks"]
    for name, value in (("d2f_block_size", block_size), ("d2f_max_blocks", max_blocks)):
        if isinstance(value, float) or not 1 <= value <= window:
            raise ValueError(f"{name} must be an integer in [1, {window}], got {value!r}")
    if "d2f_max_blocks" not in given:
        chosen["max_blocks"] = max_blocks = min(max_blocks, window // block_size)
    if block_size * max_blocks > window:
        raise ValueError(
            f"d2f_block_size * d2f_max_blocks = {block_size} * {max_blocks} = "
            f"{block_size * max_blocks} must be in [1, {window}], the served window; use at most "
            f"{window // block_size} blocks of {block_size}, or start the server with a larger "
            '--additional-config \'{"d2f": {"window": N}}\''
        )
    for name in ("tau_add", "tau_act", "tau_conf"):
        if not 0 <= chosen[name] <= 1:
            raise ValueError(f"d2f_{name} must be a number in [0, 1], got {chosen[name]!r}")
    return D2FParams(**chosen)


def _remedy(option: str) -> str:
    """What to say of an option that a D2F model does not have, before the list of those it has."""
    if option.endswith("_transfer_params"):
        return "a D2F server has no connector that takes it, remove it; D2F options"
    return "D2F options"


REMOVED_FIELDS = {
    "guided_json": 'structured_outputs {"json": ...} or response_format',
    "guided_regex": 'structured_outputs {"regex": ...}',
    "guided_choice": 'structured_outputs {"choice": [...]}',
    "guided_grammar": 'structured_outputs {"grammar": ...}',
    "guided_decoding_backend": "the server's --structured-outputs-config",
    "guided_whitespace_pattern": 'structured_outputs {"whitespace_pattern": ...}',
}
"""Fields of a request that vLLM had once and ignores now, and what took their place."""


def add_request_fields(params: "SamplingParams", fields: Mapping[str, Any]) -> None:
    """Take D2F's options from a request's fields that vLLM does not know (`patches/p08`).

    Args:
        params: of this request; its `extra_args` get the options that are not null.
        fields: the unknown fields.

    Raises:
        VLLMValidationError: a field that vLLM removed, or an option given twice.
    """
    from vllm.exceptions import VLLMValidationError

    for name, successor in REMOVED_FIELDS.items():
        if fields.get(name) is not None:
            raise VLLMValidationError(
                f"{name} is not supported any more; use {successor}.", parameter=name
            )
    options = {k: v for k, v in fields.items() if k.startswith("d2f_") and v is not None}
    given = params.extra_args or {}
    for name in sorted(options.keys() & given.keys()):
        raise VLLMValidationError(
            f"{name} stands in vllm_xargs and beside it; remove one of them.", parameter=name
        )
    if options:
        params.extra_args = {**given, **options}


def _preset(settings: Settings, name: Any) -> dict[str, Any]:
    """Published settings, by full name or without the served model's family in front."""
    known = PRESETS.get(f"{settings.family}-{name}") or PRESETS.get(str(name))
    if known is None:
        start = f"{settings.family}-"
        short = [preset.removeprefix(start) for preset in PRESETS if preset.startswith(start)]
        raise ValueError(
            f"d2f_preset must be one of {', '.join([*short, *PRESETS])}, got {name!r:.80}"
        )
    if known["block_size"] > settings.window:
        raise ValueError(
            f"d2f_preset {name!r:.80} has blocks of {known['block_size']}, the served window is "
            f"{settings.window}; start the server with a larger "
            '--additional-config \'{"d2f": {"window": N}}\''
        )
    return known


def wants_trace(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request asks when each of its tokens was decided (`d2f_trace`).

    Raises:
        ValueError: neither yes nor no.
    """
    value = (extra_args or {}).get(_TRACE, False)
    if value in ("0", "1"):
        value = int(value)
    if value not in (0, 1, False, True):
        raise ValueError(f"{_TRACE} must be 0 or 1, got {value!r:.80}")
    return bool(value)


def _number(name: str, value: Any) -> int | float:
    """A number as JSON or a form carries it; vLLM passes strings through as they are."""
    # Python's own reading is wider: other digits, "1_000", "nan".
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if any(c in value for c in ".eE") else int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r:.80}")
    return value


def is_d2f(model_config: "ModelConfig") -> bool:
    """Whether vLLM serves this model through vllm-d2f."""
    return any(name in FAMILIES for name in model_config.architectures)


def served_settings(model_config: "ModelConfig") -> Settings:
    """The settings that start-up resolved (`vllm_d2f.startup` left them in the model's config)."""
    config = model_config.hf_config
    return settings_from_dict(config.d2f, family=config.family)


def end_tokens(params: "SamplingParams") -> list[int]:
    """The tokens that end a request: the model's end tokens unless ignored, and its stop tokens."""
    stops: Sequence[int] = params.stop_token_ids or ()
    eos = [] if params.ignore_eos or params.eos_token_id is None else [params.eos_token_id]
    return list(dict.fromkeys([*eos, *stops]))[:MAX_END_TOKENS]


def check_sampling_params(params: "SamplingParams", model_config: "ModelConfig") -> None:
    """Refuse what D2F decoding cannot honour, where vLLM admits a request (HTTP 400).

    Also names every end token of the model in `params.stop_token_ids`.

    Raises:
        VLLMValidationError: with the parameter's name and what is allowed.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        request_params(served_settings(model_config), params.extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None

    if wants_trace(params.extra_args):
        _check_trace(params)
    for name, reason in _unsupported(params, model_config).items():
        raise VLLMValidationError(f"{name}: {reason}", parameter=name)
    if not params.ignore_eos:
        # Some checkpoints end a turn with a token that generation_config.json does not list.
        stops = list(params.stop_token_ids or ())
        params.stop_token_ids = list(dict.fromkeys([*stops, *model_config.hf_config.end_token_ids]))
        # min_tokens and grammars go by this set.
        params.all_stop_token_ids.update(params.stop_token_ids)
    vocabulary = model_config.get_vocab_size()
    # A token that does not exist never ends an answer, and no tensor has a place for it.
    params.stop_token_ids = [t for t in params.stop_token_ids or () if t < vocabulary]
    there = {token for token in params.all_stop_token_ids if token < vocabulary}
    params.all_stop_token_ids.intersection_update(there)
    # More than the vocabulary is no limit, and beyond 64 bits no number for a tensor.
    params.top_k = min(params.top_k, vocabulary)
    _check_something_is_allowed(params, model_config)


def check_structured_outputs(
    params: "SamplingParams",
    model_config: "ModelConfig",
    config: "StructuredOutputsConfig | None",
) -> None:
    """Refuse structured outputs that cannot be honoured; vLLM checks the grammar itself.

    Raises:
        VLLMValidationError: with what to change.
    """
    from vllm.exceptions import VLLMValidationError

    reasons = {
        "Structured outputs with allowed_token_ids or bad_words are not supported for D2F models: "
        "together they can leave no token. Remove these, or write them into the grammar.": bool(
            params.allowed_token_ids or params.bad_words
        ),
        "Structured outputs behind reasoning are not supported for D2F models. Start the server "
        "without --reasoning-parser, or with structured_outputs_config.enable_in_reasoning.": (
            config is not None and bool(config.reasoning_parser) and not config.enable_in_reasoning
        ),
        f"Structured outputs need real tokens; start the server without d2f.{_SIMULATE}.": (
            served_settings(model_config).simulate_tokens_per_forward is not None
        ),
    }
    for reason, hit in reasons.items():
        if hit:
            raise VLLMValidationError(reason, parameter="structured_outputs")


def _check_trace(params: "SamplingParams") -> None:
    """A trace travels in a field that vLLM puts into whole responses, once for each."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    for reason, hit in {
        f"{_TRACE} comes with whole answers; set stream to false": (
            params.output_kind == RequestOutputKind.DELTA
        ),
        f"{_TRACE} needs n = 1, got {params.n}; send n requests": params.n != 1,
    }.items():
        if hit:
            raise VLLMValidationError(reason, parameter="vllm_xargs")


def _unsupported(params: "SamplingParams", model_config: "ModelConfig") -> dict[str, str]:
    """Parameters that D2F decoding cannot honour, and why."""
    no_prompt = (
        "not supported for D2F models. A prompt is one bidirectional block, so its tokens have no "
        "probability given those before them. Remove it; `echo` asks for it too, in a chat always "
        "and in a completion with `logprobs`: remove one of them."
    )
    mode, modes = model_config.logprobs_mode, " or ".join(LOGPROB_MODES)
    simulated = served_settings(model_config).simulate_tokens_per_forward is not None
    vocabulary = model_config.get_vocab_size()

    def outside(tokens: Sequence[int] | None, end: int) -> bool:
        return not all(0 <= token < end for token in tokens or ())

    cases = {
        "stop_token_ids": (
            outside(params.stop_token_ids, 1 << 31),
            "must be token ids, integers in [0, 2**31 - 1].",
        ),
        "logprob_token_ids": (
            outside(params.logprob_token_ids, vocabulary),
            f"must be tokens of the vocabulary, integers in [0, {vocabulary - 1}].",
        ),
        "prompt_logprobs": (params.prompt_logprobs is not None, no_prompt),
        "prompt_logprob_token_ids": (params.prompt_logprob_token_ids is not None, no_prompt),
        "logprobs": (
            params.num_logprobs is not None and mode not in LOGPROB_MODES,
            f"not supported for D2F models with --logprobs-mode {mode}; it must be {modes}.",
        ),
        "bad_words": (
            bool(params.bad_words) and (simulated or bool(params.allowed_token_ids)),
            f"not supported for D2F models beside allowed_token_ids or d2f.{_SIMULATE}.",
        ),
        "logit_bias": (
            not all(math.isfinite(bias) for bias in (params.logit_bias or {}).values()),
            "values must be finite numbers in [-100, 100].",
        ),
        "seed": (
            params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63,
            "must be an integer in [-2**63, 2**63 - 1].",
        ),
        "thinking_token_budget": (
            params.thinking_token_budget is not None,
            "not supported for D2F models; remove it.",
        ),
        "watermarking": (
            params.watermarking is True,
            "not supported for D2F models; remove it.",
        ),
        "trace_decode_token_ids": (
            params.trace_decode_token_ids is not None,
            "not supported for D2F models; remove it.",
        ),
    }
    return {name: reason for name, (hit, reason) in cases.items() if hit}


def _check_something_is_allowed(params: "SamplingParams", model_config: "ModelConfig") -> None:
    """At every position `allowed_token_ids` must leave a token that can be proposed."""
    from vllm.exceptions import VLLMValidationError

    config = model_config.hf_config
    left = set(params.allowed_token_ids or ()) - {config.mask_token_id}
    if params.min_tokens:
        left -= {*config.end_token_ids, *(params.stop_token_ids or ())}
    if params.allowed_token_ids and not left:
        raise VLLMValidationError(
            "allowed_token_ids: no token is left that may be proposed: the mask token never may, "
            "and end tokens may not before min_tokens. Allow at least one more.",
            parameter="allowed_token_ids",
        )
