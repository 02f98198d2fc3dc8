# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints in the official layouts, and engines on them, made once per module."""

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from checkpoints import write_dream, write_llada  # noqa: E402


@pytest.fixture(scope="session")
def dream(tmp_path_factory):
    """A random Dream checkpoint without a tokenizer: the logits are shifted."""
    return str(write_dream(tmp_path_factory.mktemp("dream"), tokenizer=False))


@pytest.fixture(scope="session")
def llada(tmp_path_factory):
    """A random LLaDA checkpoint in two shards: no shift."""
    return str(write_llada(tmp_path_factory.mktemp("llada"), tokenizer=False, shards=2, seed=1))


@pytest.fixture(scope="session", autouse=True)
def plugin():
    """With D2F_TEST_ASYNC=1 every engine that does not choose schedules asynchronously."""
    from vllm_d2f import register
    from vllm_d2f import startup as config

    register()
    if os.environ.get("D2F_TEST_ASYNC") == "1":
        config.ASYNC_BY_DEFAULT = True
