# SPDX-License-Identifier: Apache-2.0
"""Known vulnerabilities of everything that is installed here, by PyPI's own records.

    python -m benchmarks.reliability.audit --json benchmarks/results/reliability_audit.json

`pip-audit` asks the index for each exact version, which a mirror may not have. This asks for each
project, whose record names the vulnerabilities of its newest release: a package that is installed
in its newest release is judged, an older one is listed as not judged.
"""

import argparse
import importlib.metadata
import json
import sys
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

INDEX = "https://pypi.org/pypi"
SECONDS = 30


def installed() -> dict[str, str]:
    """Name -> version, without what a local build adds to it."""
    found = importlib.metadata.distributions()
    return {d.metadata["Name"]: d.version.partition("+")[0] for d in found}


def ask(name: str) -> dict[str, Any] | str:
    """A project's record, or why there is none."""
    try:
        with urllib.request.urlopen(f"{INDEX}/{name}/json", timeout=SECONDS) as response:
            return json.load(response)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def judge(
    versions: Mapping[str, str], records: Mapping[str, dict[str, Any] | str]
) -> dict[str, Any]:
    """What the records say about these versions."""
    report: dict[str, Any] = {"judged": [], "vulnerable": {}, "older": {}, "unknown": {}}
    for name in sorted(versions, key=str.lower):
        record = records[name]
        if isinstance(record, str):
            report["unknown"][name] = record
        elif record["info"]["version"] != versions[name]:
            report["older"][name] = [versions[name], record["info"]["version"]]
        else:
            report["judged"].append(f"{name}=={versions[name]}")
            known = [v for v in record["vulnerabilities"] if not v.get("withdrawn")]
            if known:
                report["vulnerable"][name] = [
                    {"id": v["id"], "fixed_in": v.get("fixed_in", []), "what": _what(v)}
                    for v in known
                ]
    return report


def _what(record: Mapping[str, Any]) -> str:
    return (record.get("summary") or record.get("details") or "")[:200]


def audit(versions: Mapping[str, str]) -> dict[str, Any]:
    names: Iterable[str] = list(versions)
    with ThreadPoolExecutor(8) as pool:
        records = dict(zip(names, pool.map(ask, names), strict=True))
    return {"date": date.today().isoformat(), "packages": len(versions), **judge(versions, records)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    report = audit(installed())
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{report['packages']} packages: {len(report['judged'])} judged, "
        f"{len(report['older'])} not in their newest release, {len(report['unknown'])} unknown"
    )
    for name, found in report["vulnerable"].items():
        for one in found:
            print(f"{name}: {one['id']}, fixed in {one['fixed_in'] or 'no release'}: {one['what']}")
    return 1 if report["vulnerable"] else 0


if __name__ == "__main__":
    sys.exit(main())
