# SPDX-License-Identifier: Apache-2.0
"""p05: vLLM serves the models of this package by name."""

from typing import Any

from vllm_d2f.patches.patch import Original, patch

REDIRECT = "vllm.config.model:maybe_model_redirect"
SPECULATORS = "vllm.engine.arg_utils:maybe_override_with_speculators"
OFFLINE = "vllm.engine.arg_utils:get_model_path"
TOKENIZER = "vllm.tokenizers.registry:cached_resolve_tokenizer_args"


@patch(
    REDIRECT,
    apply="process",
    why="vLLM takes a model name for a folder or a Hub id, so `vllm serve d2f-tiny` would ask the "
    "Hub for a model that ships with this package. `vllm bench` asks it for a tokenizer too.",
    how="vLLM's own redirect (`VLLM_MODEL_REDIRECT_PATH`) also resolves the names of "
    "`vllm_d2f.hub.names`, and the two Hub look-ups that run before it skip these names. What "
    "finds a tokenizer's files gets the folder of a name. The user's redirect file comes first; "
    "folders and Hub ids are handled by the original.",
    upstream="none yet: vLLM lacks a registry of model locations, as `register_model` is one of "
    "architectures",
    remove_when="a plugin can register model names",
    written_against={
        REDIRECT: "c059c0ecf1027c6d",
        SPECULATORS: "f757de6fee98d435",
        OFFLINE: "41775b7b871aa027",
        TOKENIZER: "1c27c8ef653f4947",
    },
)
def p05_model_names(original: Original, model: str) -> str:
    from vllm_d2f.hub.names import resolve

    redirected = original(model)
    return redirected if redirected != model else resolve(model)


@p05_model_names.also(SPECULATORS)
def _speculators(
    original: Original,
    model: str,
    tokenizer: str | None,
    trust_remote_code: bool,
    revision: str | None = None,
    vllm_speculative_config: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from vllm_d2f.hub.names import is_name, refuse_unservable

    refuse_unservable(model)
    if not is_name(model):
        return original(
            model, tokenizer, trust_remote_code, revision, vllm_speculative_config, *args, **kwargs
        )
    # The original asks the Hub for the model's config.
    if revision is not None:
        raise ValueError(
            f"--revision {revision} is for a Hub id, {model} stands for a base and an "
            f"adapter. Pin them once: python -m vllm_d2f prepare {model} --base-revision "
            "REV --adapter-revision REV"
        )
    return model, tokenizer, vllm_speculative_config


@p05_model_names.also(OFFLINE)
def _offline(original: Original, model: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_d2f.hub.names import is_name

    # With HF_HUB_OFFLINE the original looks the name up in the Hub's cache. The name is not
    # resolved yet, because vLLM later derives from it the model name that clients use.
    return model if is_name(model) else original(model, *args, **kwargs)


@p05_model_names.also(TOKENIZER)
def _tokenizer(original: Original, tokenizer_name: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm_d2f.hub.names import tokenizer_of

    return original(tokenizer_of(str(tokenizer_name)), *args, **kwargs)
