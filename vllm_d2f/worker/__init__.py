# SPDX-License-Identifier: Apache-2.0
"""The worker's side of D2F: model, attention inputs and sampler."""
