# SPDX-License-Identifier: Apache-2.0
"""Makes tests/checkpoints.py importable from this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
