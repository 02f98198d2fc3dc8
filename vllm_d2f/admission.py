# SPDX-License-Identifier: Apache-2.0
"""Admission: which sampling parameters a request to a D2F model may have.

vLLM runs these checks when it admits a request (`patches/p01`), so a server answers HTTP 400 and
`LLM.generate` raises an error before the engine sees the request.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_d2f.request_fields import add_http_options, refuse
from vllm_d2f.sampling.logprobs import MODES as LOGPROB_MODES
from vllm_d2f.settings import SIMULATE, request_params, served_settings, wants_trace
from vllm_d2f.strategies import ONE_BY_ONE

if TYPE_CHECKING:
    from vllm.config import ModelConfig, StructuredOutputsConfig
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from xgrammar import Grammar, GrammarCompiler

MAX_END_TOKENS = 8
"""End tokens of a request that end its window early; further ones end it one block later."""

FIRST_POSITION = {
    "d2f_accept": "leftmost", "d2f_tau_conf": 1.0, "d2f_min_per_step": 1, "d2f_sub_block_size": 0,
}  # fmt: skip
"""How a token is decoded whose probabilities alone are asked for, as `/generative_scoring` does: in
the first forward, while the rest of its block is masked."""

MAX_PROBED_RULES = 2000
"""A grammar with more rules is not searched for stuck ones: that would hold up all requests of the
server for seconds. An answer that reaches such a rule then ends with an error."""


def end_tokens(params: "SamplingParams") -> list[int]:
    """Return the tokens that end a request: its stop tokens, and the model's unless ignored."""
    stops: Sequence[int] = params.stop_token_ids or ()
    eos = [] if params.ignore_eos or params.eos_token_id is None else [params.eos_token_id]
    return list(dict.fromkeys([*eos, *stops]))[:MAX_END_TOKENS]


def check_sampling_params(params: "SamplingParams", model_config: "ModelConfig") -> None:
    """Refuse the sampling parameters that D2F decoding cannot honour.

    Also adds the model's end tokens to `params.stop_token_ids` and drops from it the tokens that
    the vocabulary does not have.

    Raises:
        VLLMValidationError: with the parameter's name and what is allowed.
    """
    from vllm.sampling_params import RequestOutputKind

    add_http_options(params)
    if params.max_tokens == 1 and params.logprob_token_ids:
        params.extra_args = FIRST_POSITION | (params.extra_args or {})
    try:
        rule = request_params(served_settings(model_config), params.extra_args).accept
    except ValueError as error:
        refuse("vllm_xargs", str(error))
    if rule not in ONE_BY_ONE and (params.structured_outputs is not None or params.bad_words):
        refuse(
            "vllm_xargs",
            f"d2f_accept {rule} decides about the positions of a block together, and structured "
            "outputs and bad_words are decoded from left to right; send a d2f_accept of "
            f"{' or '.join(ONE_BY_ONE)} with a d2f_tau_conf for it",
        )
    if wants_trace(params.extra_args):
        # vLLM puts the field that carries a trace into whole responses, once for each response.
        if params.output_kind == RequestOutputKind.DELTA:
            refuse("vllm_xargs", "d2f_trace comes with whole answers; set stream to false")
        if params.n != 1:
            refuse("vllm_xargs", f"d2f_trace needs n = 1, got {params.n}; send n requests")
    for name, (hit, reason) in _unsupported(params, model_config).items():
        if hit:
            refuse(name, f"{name}: {reason}")
    if not params.ignore_eos:
        # Some checkpoints end a turn with a token that generation_config.json does not list.
        stops = list(params.stop_token_ids or ())
        params.stop_token_ids = list(dict.fromkeys([*stops, *model_config.hf_config.end_token_ids]))
        # vLLM applies min_tokens and grammars to this set.
        params.all_stop_token_ids.update(params.stop_token_ids)
    vocabulary = model_config.get_vocab_size()
    # A token outside the vocabulary never ends an answer, and indexes no logit.
    params.stop_token_ids = [t for t in params.stop_token_ids or () if t < vocabulary]
    there = {token for token in params.all_stop_token_ids if token < vocabulary}
    params.all_stop_token_ids.intersection_update(there)
    # A top_k above the vocabulary's size limits nothing, and above 64 bits it fits no tensor.
    params.top_k = min(params.top_k, vocabulary)


def check_structured_outputs(
    params: "SamplingParams",
    model_config: "ModelConfig",
    config: "StructuredOutputsConfig | None",
) -> None:
    """Refuse structured outputs that cannot be honoured. vLLM checks the grammar itself.

    Raises:
        VLLMValidationError: with what to change.
    """
    parameter = "structured_outputs"
    if params.allowed_token_ids or params.bad_words:
        refuse(
            parameter,
            "Structured outputs with allowed_token_ids or bad_words are not supported for D2F "
            "models: together they can leave no token. Remove these, or write them into the "
            "grammar.",
        )
    if config is not None and config.reasoning_parser and not config.enable_in_reasoning:
        refuse(
            parameter,
            "Structured outputs behind reasoning are not supported for D2F models. Start the "
            "server without --reasoning-parser, or with "
            "structured_outputs_config.enable_in_reasoning.",
        )
    if served_settings(model_config).simulate_tokens_per_forward is not None:
        without = f"start the server without d2f.{SIMULATE}."
        refuse(parameter, f"Structured outputs need real tokens; {without}")


def check_grammar(structured: "StructuredOutputsParams") -> None:
    """Refuse a grammar with a rule that allows no next character, such as `more ::= more`.

    An answer that reaches such a rule can neither continue nor end. A JSON schema that refers to
    itself can have one too.

    Raises:
        VLLMValidationError: with the rule's name and what to change.
    """
    schema = structured.json
    if isinstance(schema, dict):
        schema = json.dumps(schema)
    refers = schema is not None and '"$ref"' in schema
    if structured._backend != "xgrammar" or (structured.grammar is None and not refers):
        return
    import xgrammar

    if structured.grammar is not None:
        stuck = stuck_rules(xgrammar.Grammar.from_ebnf(structured.grammar))
        problem = f"grammar: no text matches `{stuck[-1]}`" if stuck else ""
        remedy = "every rule"
    else:
        assert schema is not None
        stuck = stuck_rules(xgrammar.Grammar.from_json_schema(schema))
        problem, remedy = "json: no text matches a part of it", "every `$ref` to itself"
    if stuck:
        change = f"Give {remedy} an alternative that begins with a text."
        refuse("structured_outputs", f"structured_outputs.{problem}. {change}")


def stuck_rules(grammar: "Grammar") -> list[str]:
    """Return the names of a grammar's rules that match no text and allow no next character.

    Every rule is tried once with xgrammar's own matcher: behind a probe rule `"0;" first | "1;"
    second | ...` the matcher accepts a rule's label and then shows which characters may follow. The
    probe is a tree with a digit of the label at each branch: the matcher tries every alternative,
    and of a single rule there would be as many as there are rules.
    """
    import xgrammar

    # The text of a grammar has one rule per line, and can be read again.
    text = str(grammar)
    names = [line.partition(" ::= ")[0].strip() for line in text.splitlines() if " ::= " in line]
    if len(names) > MAX_PROBED_RULES:
        return []
    probe = max(names, key=len) + "_"  # a name that no rule has
    width = len(f"{len(names):x}")
    labels = [f"{i:0{width}x}" for i in range(len(names))]
    tree: dict[str, dict[str, str]] = {}
    for label, name in zip(labels, names, strict=True):
        for depth, digit in enumerate(label):
            behind = f'";" {name}' if depth == width - 1 else f"{probe}{label[: depth + 1]}"
            tree.setdefault(label[:depth], {})[digit] = f'("{digit}" {behind})'
    rules = [f"{probe}{node} ::= {' | '.join(tree[node].values())}" for node in tree]
    try:
        tried = xgrammar.Grammar.from_ebnf("\n".join((text, *rules, "")), root_rule_name=probe)
        compiled = _byte_compiler().compile_grammar(tried)
    except RuntimeError:
        return []  # xgrammar does not read what it has printed; then no rule is known to be stuck
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    allowed_1B = xgrammar.allocate_token_bitmask(1, 256)
    stuck = []
    for label, name in zip(labels, names, strict=True):
        matcher.reset()
        matcher.accept_string(f"{label};")
        if not matcher.is_completed():
            matcher.fill_next_token_bitmask(allowed_1B)
            if not allowed_1B.any():
                stuck.append(name)
    return stuck


@functools.cache
def _byte_compiler() -> "GrammarCompiler":
    """Return a compiler of byte tokens: whether a rule gets stuck needs no others."""
    import xgrammar

    tokens = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], stop_token_ids=[])
    return xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)


def _unsupported(
    params: "SamplingParams", model_config: "ModelConfig"
) -> dict[str, tuple[bool, str]]:
    """Return for each parameter whether D2F cannot honour its value, and the reason."""
    removed = "not supported for D2F models; remove it."
    no_prompt = (
        "not supported for D2F models. A prompt is one bidirectional block, so its tokens have no "
        "probability given those before them. Remove it; `echo` asks for it too, in a chat always "
        "and in a completion with `logprobs`: remove one of them."
    )
    mode, modes = model_config.logprobs_mode, " or ".join(LOGPROB_MODES)
    simulated = served_settings(model_config).simulate_tokens_per_forward is not None
    vocabulary, config = model_config.get_vocab_size(), model_config.hf_config
    # The tokens that may be sampled at the positions with the most restrictions.
    left = set(params.allowed_token_ids or ()) - {config.mask_token_id}
    if params.min_tokens:
        left -= {*config.end_token_ids, *(params.stop_token_ids or ())}

    def outside(tokens: Sequence[int] | None, end: int) -> bool:
        return not all(0 <= token < end for token in tokens or ())

    return {
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
            f"not supported for D2F models beside allowed_token_ids or d2f.{SIMULATE}.",
        ),
        "logit_bias": (
            not all(math.isfinite(bias) for bias in (params.logit_bias or {}).values()),
            "values must be finite numbers in [-100, 100].",
        ),
        "seed": (
            params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63,
            "must be an integer in [-2**63, 2**63 - 1].",
        ),
        "thinking_token_budget": (params.thinking_token_budget is not None, removed),
        "watermarking": (params.watermarking is True, removed),
        "trace_decode_token_ids": (params.trace_decode_token_ids is not None, removed),
        "allowed_token_ids": (
            bool(params.allowed_token_ids) and not left,
            (
                "no token is left that may be proposed: the mask token never may, and end tokens "
                "may not before min_tokens. Allow at least one more."
            ),
        ),
    }
