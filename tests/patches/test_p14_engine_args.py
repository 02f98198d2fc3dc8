# SPDX-License-Identifier: Apache-2.0
"""p14: the hook of a model's config can see which engine arguments the user gave."""

import inspect
from types import SimpleNamespace

from vllm.engine.arg_utils import EngineArgs
from vllm_d2f.patches.p14_engine_args import CREATE
from vllm_d2f.patches.p14_engine_args import p14_engine_args as PATCH
from vllm_d2f.patches.patch import source_hash

from vllm_d2f import engine_args


def test_it_was_written_against_this_vllm():
    assert source_hash(vars(EngineArgs)["create_engine_config"]) == PATCH.written_against[CREATE]


def test_what_the_user_gave_is_kept_while_vllm_fills_in_its_defaults():
    args, seen = SimpleNamespace(enable_chunked_prefill=None), []

    def original(self, *rest, **more):
        self.enable_chunked_prefill = True
        seen.append((engine_args._given.get().enable_chunked_prefill, rest, more))
        return "config"

    assert PATCH.wrap(CREATE, original)(args, 1, headless=True) == "config"
    assert seen == [(None, (1,), {"headless": True})] and args.enable_chunked_prefill
    assert engine_args._given.get() is None


def test_still_needed():
    """Fails when vLLM leaves the arguments as the user gave them: then delete p14."""
    assert "self.enable_chunked_prefill = " in inspect.getsource(EngineArgs)
