# SPDX-License-Identifier: Apache-2.0
"""Dream's tokenizer under the class name that its checkpoints ask for."""

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE.

    Dream's own `DreamTokenizer` is a copy of Qwen2's slow tokenizer published as remote code; its
    two extra tokens (begin of text, mask) are listed in `added_tokens_decoder` and need no code.
    """
