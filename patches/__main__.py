# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_d2f.patches`: the state of each patch. `--write` renews the table of a clone."""

import argparse
from pathlib import Path

from vllm_d2f.patches import applied, apply, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "patches.md"


def page() -> str:
    """Return the text of docs/patches.md: what stands above its table, and the table of today."""
    above, _, _ = PAGE.read_text(encoding="utf-8").partition("| patch |")
    return above + table() + "\n"


def main() -> None:
    """Print the states, or write the table."""
    parser = argparse.ArgumentParser(prog="python -m vllm_d2f.patches", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the table in docs/patches.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
        return
    import vllm

    apply("process")
    print(f"vLLM {vllm.__version__}")
    for name, state in applied().items():
        print(f"{name}: {state}")


if __name__ == "__main__":
    main()
