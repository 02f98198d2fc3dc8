# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with D2F's two differences: window widths, and which prompts may share pages."""

import hashlib
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from vllm_d2f.settings import request_params, served_settings


class D2FScheduler(Scheduler):
    """Schedules each request's open blocks as its draft tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = served_settings(self.vllm_config.model_config)

    def add_request(self, request: Request) -> None:
        if request.block_hashes or self.cache_config.enable_prefix_caching:
            self._salt(request)
        super().add_request(request)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take over the windows the worker prepared, each as wide as its open blocks."""
        for i, token_ids in enumerate(draft_token_ids.draft_token_ids):
            if -1 in token_ids:
                draft_token_ids.draft_token_ids[i] = token_ids[: token_ids.index(-1)]
        super().update_draft_token_ids(draft_token_ids)

    def _salt(self, request: Request) -> None:
        """Let only requests with the identical whole prompt and block size share pages.

        A bidirectional prompt's keys and values depend on all of it, and a committed block's on how
        the answer is cut into blocks. With a block-causal prompt they depend on what stands before.
        """
        block_size = request_params(
            self.settings, request.sampling_params.extra_args if request.sampling_params else None
        ).block_size
        salt = f"{request.cache_salt or ''}|d2f:{block_size}"
        if self.settings.prompt_attention == "bidirectional":
            tokens = ",".join(map(str, request.prompt_token_ids or ()))
            salt += "|" + hashlib.sha256(tokens.encode()).hexdigest()
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()
