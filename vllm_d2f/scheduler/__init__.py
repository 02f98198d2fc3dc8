# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of D2F. vLLM imports its scheduler from here."""

from vllm_d2f.scheduler.scheduler import D2FScheduler

__all__ = ["D2FScheduler"]
