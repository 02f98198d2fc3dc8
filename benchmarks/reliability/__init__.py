# SPDX-License-Identifier: Apache-2.0
"""Load, aborts and batch mixes against the reference: one module per question, each a command."""
