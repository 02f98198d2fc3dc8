# SPDX-License-Identifier: Apache-2.0
"""Training of D2F models. Needs torch, transformers and tokenizers; imports nothing of vLLM."""
