# SPDX-License-Identifier: Apache-2.0
"""The error of this package."""


class HubError(ValueError):
    """A model cannot be prepared; the message says why and what to do."""
