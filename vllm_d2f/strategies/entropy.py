# SPDX-License-Identifier: Apache-2.0
"""Entropy rule (d3LLM, dParallel): accept below an entropy, at least so many in an active block.

The confidence of a request with this rule is exp(-H) for the entropy H of a position in nats. It
lies in (0, 1] and falls as H rises, so all that holds for probabilities holds for it: the order of
positions, 0 where there is no distribution, and a negative one where nothing may be decoded.
H < `tau_conf` is exp(-H) > exp(-`tau_conf`), which makes the rule that of `threshold`.
"""

import math

from vllm_d2f.strategies.threshold import accept

__all__ = ["MOST", "accept", "least_confidence"]

MOST = 20.0
"""The largest threshold in nats. A uniform choice among 485 million tokens has this entropy."""


def least_confidence(tau_conf: float) -> float:
    """Return the confidence of a position whose entropy is the threshold."""
    return math.exp(-tau_conf)
