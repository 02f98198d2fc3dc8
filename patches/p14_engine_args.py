# SPDX-License-Identifier: Apache-2.0
"""p14: the engine arguments as the user gave them."""

from typing import TYPE_CHECKING, Any

from vllm_d2f.patches.patch import Original, patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

CREATE = "vllm.engine.arg_utils:EngineArgs.create_engine_config"


@patch(
    CREATE,
    apply="process",
    why="vLLM fills in its defaults before it asks a model's config hook, so the hook cannot tell "
    "`--enable-chunked-prefill` of the user from vLLM's default. D2F would replace the user's "
    "value silently.",
    how="Keeps a copy of the arguments while the original builds the configuration of them. Only "
    "D2F's hook reads it.",
    upstream="none yet: vLLM lacks a record of the arguments that a user gave",
    remove_when="the config hook gets the user's arguments",
    written_against={CREATE: "b9b94288f46d2f67"},
)
def p14_engine_args(
    original: Original, self: "EngineArgs", *args: Any, **kwargs: Any
) -> "VllmConfig":
    from vllm_d2f.engine_args import given

    with given(self):
        return original(self, *args, **kwargs)
