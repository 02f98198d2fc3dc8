# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_d2f.patches`: what was applied here. With `--write`: renew README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_d2f.patches import applied, apply_all, table

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: python -m vllm_d2f.patches --write -->\n", "\n<!-- end of table -->"


def render(text: str) -> str:
    """README.md with its table renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(prog="python -m vllm_d2f.patches", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the table in README.md")
    if parser.parse_args().write:
        README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
        return
    import vllm

    apply_all()
    print(f"vLLM {vllm.__version__}")
    for name, state in applied().items():
        print(f"{name}: {state}")


if __name__ == "__main__":
    main()
