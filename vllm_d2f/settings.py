# SPDX-License-Identifier: Apache-2.0
"""D2F settings: the defaults, the presets, what a served model adds, and what a request adds.

From weakest to strongest: the package's defaults, the model family's defaults, the `d2f` section
of `generation_config.json`, that of `config.json`, `--additional-config '{"d2f": {...}}'`, and a
request's `vllm_xargs`. Every unknown name and every value out of range raises an error that names
the allowed ones.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

from vllm_d2f.d2f import D2FParams
from vllm_d2f.models import FAMILIES, PRESETS
from vllm_d2f.models.family import BlockOrigin, Family, PromptAttention
from vllm_d2f.strategies import ACCEPT

if TYPE_CHECKING:
    from vllm.config import ModelConfig

MAX_WINDOW = 4096
"""Widest window a server may be started with, in positions: bounds the state kept per request."""

# Setting -> its default without a family, and its values.
_ATTENTION_RULES = {
    "prompt_attention": ("bidirectional", get_args(PromptAttention)),
    "block_origin": ("prompt_end", get_args(BlockOrigin)),
}

_PRESET, _TRACE, _ADAPTIVE = "d2f_preset", "d2f_trace", "d2f_adaptive_window"
SIMULATE = "simulate_tokens_per_forward"
_PARAM_NAMES = tuple(f.name for f in fields(D2FParams))
_KNOWN = {*_PARAM_NAMES, "window", "prompt_attention", "block_origin", "preset", SIMULATE}
_KNOWN |= {"adaptive_window"}

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a served model decodes.

    Attributes:
        params: the decoding parameters of a request that gives none of its own.
        window: positions of the widest window that a request may ask for.
        prompt_attention: "bidirectional" (D2F as published), or "block_causal" for models that were
            trained with a prompt cut into blocks of `params.block_size` from its start.
        block_origin: where the answer's blocks are counted from: "prompt_end" (D2F as published),
            or "zero", the start of the sequence. With "zero" the first block of the answer also
            holds the prompt's last tokens, unless the prompt ends where a block ends.
        simulate_tokens_per_forward: accept this many positions per forward and request from left to
            right, whatever the model predicts, to time a model without its weights
            (`load_format=dummy`). The text then means nothing. None switches it off.
        family: the model family whose presets a request may name without the family's name in
            front, for example "dream".
        adaptive_window: whether a request that does not say is decoded with an adaptive window
            (`scheduler.adaptive`); None where the engine cannot have one.
    """

    params: D2FParams
    window: int
    prompt_attention: str = "bidirectional"
    block_origin: str = "prompt_end"
    simulate_tokens_per_forward: float | None = None
    family: str = ""
    adaptive_window: bool | None = False

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a `d2f` section of which `settings_from_dict` makes them again."""
        section = asdict(self)
        del section["family"]
        return section.pop("params") | section


def settings_from_dict(
    *sections: Mapping[str, Any] | None, family: Family | None = None
) -> Settings:
    """Make settings of `d2f` sections, the weakest first.

    Args:
        sections: at least one is not None. Their keys are `block_size`, `max_blocks`, `tau_add`,
            `tau_act`, `tau_conf`, `min_per_step`, `accept`, `sub_block_size`, `cut_last_block`,
            `window` (block_size * max_blocks where no section gives it), `prompt_attention`,
            `block_origin`, `preset`, `adaptive_window`, and `simulate_tokens_per_forward`.
        family: the model's family, whose `prompt_attention` and `block_origin` are the defaults,
            and its preset `default` if it has one.

    Raises:
        ValueError: no section at all, an unknown key, a value out of range, or an acceptance rule
            without its threshold.
    """
    own = family.presets.get("default") if family else None
    sections = (own, *sections)
    given = [part for one in sections if one is not None for part in _with_preset(one)]
    if not given:
        raise ValueError(
            "this checkpoint has no D2F settings. Serve a model distilled with D2F and say how it "
            'decodes, for example --additional-config \'{"d2f": {"block_size": 32, "max_blocks": '
            f'4}}}}\' or --additional-config \'{{"d2f": {{"preset": "{next(iter(PRESETS))}"}}}}\' '
            f"(presets: {', '.join(PRESETS)})"
        )
    merged = functools.reduce(_override, given)
    rules: dict[str, Any] = {}
    for name, (default, allowed) in _ATTENTION_RULES.items():
        rules[name] = merged.pop(name, getattr(family, name, default))
        if rules[name] not in allowed:
            raise ValueError(
                f"d2f: {name} must be one of {', '.join(allowed)}, got {rules[name]!r:.80}"
            )
    window, simulate = merged.pop("window", None), merged.pop(SIMULATE, None)
    adaptive = merged.pop("adaptive_window", False)
    if not (adaptive is None or isinstance(adaptive, bool)):
        raise ValueError(f"d2f: adaptive_window must be true or false, got {adaptive!r:.80}")
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
    if rules["block_origin"] == "zero" and rules["prompt_attention"] != "block_causal":
        raise ValueError(
            "d2f: block_origin zero cuts prompt and answer into the same blocks, so it needs "
            f"prompt_attention block_causal, got {rules['prompt_attention']}; set both, or set "
            "block_origin to prompt_end"
        )
    if simulate is not None:
        number = isinstance(simulate, (int, float)) and not isinstance(simulate, bool)
        if not number or not 1 <= simulate <= window:
            raise ValueError(
                f"d2f: {SIMULATE} must be a number in [1, {window}], got {simulate!r:.80}"
            )
    name = family.name if family else ""
    return Settings(
        params,
        window,
        **rules,
        simulate_tokens_per_forward=simulate,
        family=name,
        adaptive_window=adaptive,
    )


def _override(weaker: dict[str, Any], stronger: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Put the stronger settings over the weaker ones.

    Raises:
        ValueError: another acceptance rule without a `tau_conf`, whose unit is the rule's own.
    """
    before = weaker.get("accept", D2FParams().accept)
    rule = stronger.get("accept", before)
    if rule != before and rule in tuple(ACCEPT) and "tau_conf" not in stronger:
        raise ValueError(
            f"{prefix}accept {rule} needs a {prefix}tau_conf beside it, for the present one was "
            f"chosen for {before}"
        )
    return weaker | stronger


def _with_preset(section: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the preset of a `d2f` section means, and the stronger rest beside it."""
    if not isinstance(section, Mapping):
        raise ValueError(f"the d2f section must be an object, got {section!r:.80}")
    if unknown := sorted(set(map(str, section)) - _KNOWN):
        raise ValueError(
            f"d2f: unknown setting {unknown[0]!r:.80}; known are {', '.join(sorted(_KNOWN))}"
        )
    rest = dict(section)
    preset = rest.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"d2f: unknown preset {preset!r:.80}; known are {', '.join(PRESETS)}")
    return _written_out(PRESETS.get(preset, {})), rest


def _written_out(preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset with its acceptance rule, because its `tau_conf` is for no other."""
    return {"accept": D2FParams().accept, **preset} if "tau_conf" in preset else dict(preset)


def request_params(settings: Settings, extra_args: Mapping[str, Any] | None) -> D2FParams:
    """Return a request's decoding parameters: the served ones, its `d2f_preset`, its options.

    A request with larger blocks and without a `d2f_max_blocks` gets as many blocks as the served
    window holds. `extra_args` are its `d2f_*` options, as vLLM keeps its `vllm_xargs`.

    Raises:
        ValueError: an unknown option, a value out of range, or blocks that exceed the window.
    """
    given = dict(extra_args or {})
    options = {f"d2f_{name}": name for name in _PARAM_NAMES}
    if unknown := sorted(given.keys() - options.keys() - {_PRESET, _TRACE, _ADAPTIVE}):
        kv = unknown[0].endswith("_transfer_params")
        remedy = "a D2F server has no connector that takes it, remove it; " if kv else ""
        known = ", ".join(sorted({*options, _PRESET, _TRACE, _ADAPTIVE}))
        raise ValueError(f"unknown option {unknown[0]!r:.80}; {remedy}D2F options are {known}")
    wants_trace(given)
    wants_adaptive_window(settings, given)
    window = settings.window
    given.pop(_TRACE, None)
    given.pop(_ADAPTIVE, None)
    preset = _preset(settings, given.pop(_PRESET)) if _PRESET in given else {}
    own = {
        options[name]: value if name == "d2f_accept" else _number(name, value)
        for name, value in given.items()
    }
    served = {name: getattr(settings.params, name) for name in _PARAM_NAMES}
    chosen = _override(served | preset, own, "d2f_")
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
    try:
        return D2FParams(**chosen)
    except ValueError as error:  # a threshold out of range
        raise ValueError(f"d2f_{error}") from None


def _preset(settings: Settings, name: Any) -> dict[str, Any]:
    """Return a preset by its full name, or by its name without the served family in front."""
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
    return _written_out(known)


def wants_trace(extra_args: Mapping[str, Any] | None) -> bool:
    """Return whether a request asks in which forward each of its tokens was decoded (`d2f_trace`).

    Raises:
        ValueError: the option is neither yes nor no.
    """
    return _yes_or_no(extra_args, _TRACE, False)


def wants_adaptive_window(settings: Settings, extra_args: Mapping[str, Any] | None) -> bool:
    """Return whether a request is decoded with an adaptive window (`d2f_adaptive_window`).

    Raises:
        ValueError: the option is neither yes nor no, or the engine cannot have such windows.
    """
    adaptive = _yes_or_no(extra_args, _ADAPTIVE, bool(settings.adaptive_window))
    if adaptive and settings.adaptive_window is None:
        raise ValueError(
            f"{_ADAPTIVE} 1 needs synchronous scheduling; start the server without "
            "--async-scheduling, or send 0"
        )
    return adaptive


def _yes_or_no(extra_args: Mapping[str, Any] | None, name: str, default: bool) -> bool:
    value = (extra_args or {}).get(name, int(default))
    if value not in (0, 1, "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r:.80}")
    return value not in (0, "0")


def _number(name: str, value: Any) -> int | float:
    """Parse a number given as one or as a string: vLLM passes strings in `vllm_xargs` through."""
    # Python's int() and float() accept more than JSON does: other digits, "1_000", "nan".
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if any(c in value for c in ".eE") else int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r:.80}")
    return value


def is_d2f(model_config: "ModelConfig") -> bool:
    """Return whether vLLM serves this model through vllm-d2f."""
    return any(name in FAMILIES for name in model_config.architectures)


def served_settings(model_config: "ModelConfig") -> Settings:
    """Return the settings that `vllm_d2f.startup` resolved and left in the model's config."""
    config = model_config.hf_config
    return settings_from_dict(config.d2f, family=config.family)
