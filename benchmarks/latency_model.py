# SPDX-License-Identifier: Apache-2.0
"""The name that `benchmarks.latency` had, for those who know it."""

import sys

from benchmarks.latency import main

if __name__ == "__main__":
    sys.exit(main())
