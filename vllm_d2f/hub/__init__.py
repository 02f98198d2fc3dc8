# SPDX-License-Identifier: Apache-2.0
"""Models by name: download a base and a D2F adapter, merge them, and keep the result."""

__all__ = ["HubError"]


class HubError(ValueError):
    """A model cannot be prepared; the message says why and what to do."""
