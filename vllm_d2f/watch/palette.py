# SPDX-License-Identifier: Apache-2.0
"""Colours of the blocks, the same wherever they are drawn."""

__all__ = ["PALETTE", "colours"]

# (strong, light), told apart by people who are colour-blind too (after Okabe and Ito).
PALETTE: tuple[tuple[str, str], ...] = (
    ("#0072b2", "#cfe5f2"),
    ("#d55e00", "#f8dfcc"),
    ("#007a5a", "#cceee3"),
    ("#a3407c", "#f3dbe9"),
    ("#8a6d00", "#f5ebc4"),
    ("#4b5a6b", "#dde2e8"),
)


def colours(block: int) -> tuple[str, str]:
    """The strong and the light colour of a block, by its index."""
    return PALETTE[block % len(PALETTE)]
