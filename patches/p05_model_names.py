# SPDX-License-Identifier: Apache-2.0
"""p05: serve the models of this package by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_d2f.patches.patch import Patch, replace

NAME = "p05_model_names"
REDIRECT = "vllm.config.model:maybe_model_redirect"
SPECULATORS = "vllm.engine.arg_utils:maybe_override_with_speculators"
OFFLINE = "vllm.engine.arg_utils:get_model_path"


def _is_ours(model: Any) -> bool:
    """Whether `model` is a name of ours. Raises for a name that only looks like one."""
    from vllm_d2f.hub.names import is_name

    return is_name(model)


def _make_redirect(original: Callable[..., str]) -> Callable[..., str]:
    def maybe_model_redirect(model: str) -> str:
        from vllm_d2f.hub.names import resolve

        # The user's own redirect file comes first.
        redirected = original(model)
        return redirected if redirected != model else resolve(model)

    return maybe_model_redirect


def _make_speculators(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_override_with_speculators(
        model: str,
        tokenizer: str | None,
        trust_remote_code: bool,
        revision: str | None = None,
        vllm_speculative_config: dict[str, Any] | None = None,
        hf_token: bool | str | None = None,
        **kwargs: Any,
    ) -> Any:
        from vllm_d2f.hub.names import refuse_unservable

        refuse_unservable(model)
        # The original asks the Hub for the config of `model`.
        if _is_ours(model):
            if revision is not None:
                raise ValueError(
                    f"--revision {revision} is for a Hub id, {model} stands for a base and an "
                    f"adapter. Pin them once: python -m vllm_d2f prepare {model} --base-revision "
                    "REV --adapter-revision REV"
                )
            return model, tokenizer, vllm_speculative_config
        return original(
            model=model,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            revision=revision,
            vllm_speculative_config=vllm_speculative_config,
            hf_token=hf_token,
            **kwargs,
        )

    return maybe_override_with_speculators


def _make_offline(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_model_path(model: Any, revision: str | None = None) -> Any:
        # With HF_HUB_OFFLINE the original looks the name up in the Hub's cache. The name is kept,
        # not resolved: the name served to clients is taken from it later.
        return model if _is_ours(model) else original(model, revision)

    return get_model_path


def apply() -> None:
    """Install the patch; a second call does nothing."""
    replace(NAME, REDIRECT, _make_redirect)
    replace(NAME, SPECULATORS, _make_speculators)
    replace(NAME, OFFLINE, _make_offline)


def needed() -> bool:
    """Always: a plugin cannot add model names to vLLM."""
    return True


PATCH = Patch(
    name=NAME,
    target=(REDIRECT, SPECULATORS, OFFLINE),
    why="vLLM takes a model name for a folder or a Hub id, so `vllm serve d2f-tiny` would ask the "
    "Hub for a model that ships with this package.",
    how="Wraps vLLM's own redirect (`VLLM_MODEL_REDIRECT_PATH`) to resolve the names of "
    "`vllm_d2f.hub.names`, and keeps the two Hub look-ups that run before it away from them. "
    "Existing folders, Hub ids and the user's redirect file go to the original first.",
    upstream="none yet: wanted is a registry of model locations, as `register_model` is for "
    "architectures",
    remove_when="a plugin can register model names",
    when="always",
    source_sha256={
        REDIRECT: "c059c0ecf1027c6d0c557928f968c997de7f90ed94700c09a699eeb914b16f26",
        SPECULATORS: "f757de6fee98d435d6121bbeec2987aa5263a626633314d615a20fd72a44ed9d",
        OFFLINE: "41775b7b871aa027a9e0ebfd73c3ac6780cccf89ee941bef17d438e0888da0da",
    },
    apply=apply,
    needed=needed,
)
