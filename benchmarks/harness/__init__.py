# SPDX-License-Identifier: Apache-2.0
"""What the experiments of `benchmarks` share; an experiment imports this and the product only."""
