# SPDX-License-Identifier: Apache-2.0
"""The process of one part: `python -m benchmarks.gpu.part STAGE PART ...`.

A module of its own: run as `__main__`, `stage` would exist twice, and a stage's `Skip` would not be
the one that the loop catches.
"""

import os
import sys

from benchmarks.gpu.stage import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # What vLLM leaves running must not keep the process.
    os._exit(code)
