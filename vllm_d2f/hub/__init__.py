# SPDX-License-Identifier: Apache-2.0
"""Models by name: download a base and a D2F adapter, merge them, and keep the result.

Importing this package loads neither torch nor vLLM nor huggingface_hub.
"""

from vllm_d2f.hub.errors import HubError

__all__ = ["HubError"]
