# SPDX-License-Identifier: Apache-2.0
"""Block-causal attention: the FlashInfer backend, and the choice of backend and CUDA graphs."""
