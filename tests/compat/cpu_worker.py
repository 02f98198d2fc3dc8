# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for `next_vllm.py`: vLLM 0.33's worker starts on a CPU without Triton.

Its worker repeats the check that p02 replaces for the configuration. No CPU build of 0.33 exists,
so this is no patch of the package: it lets the tests run the rest of that version.
"""

import vllm.v1.worker.gpu_worker as gpu_worker

if hasattr(gpu_worker, "HAS_TRITON"):
    gpu_worker.HAS_TRITON = True
