# SPDX-License-Identifier: Apache-2.0
"""The examples of README.md and docs/api.md, run as they stand against the real server."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
URL = "http://localhost:8000"


def test_the_curl_line(server):
    (line,) = re.findall(r"^curl .*?(?:[^\\]$)", README, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", line.replace(URL, server.url)], capture_output=True, text=True, timeout=600
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["text"] == "73+24=97-17=80"


def test_the_client(server):
    blocks = re.findall(r"^```python\n(.*?)^```", API, re.MULTILINE | re.DOTALL)
    (example,) = [block for block in blocks if "import openai" in block]
    done = subprocess.run(
        [sys.executable, "-c", example.replace(URL, server.url)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "73+24=97-17=80"
