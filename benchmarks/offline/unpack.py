# SPDX-License-Identifier: Apache-2.0
"""Unpack a bundle and check every file of it. Standard library only: nothing is installed yet.

python unpack.py BUNDLE FOLDER    # prints where the bundle lies, FOLDER/SHA
"""

import hashlib
import json
import sys
import tarfile
from pathlib import Path

COMPLETE = ".complete"


class BundleError(Exception):
    """A bundle that is not whole, with what to do."""


def join(bundle: Path, pieces: list, whole: Path) -> None:
    """Write the pieces into one file.

    Raises:
        BundleError: one is missing or damaged.
    """
    with whole.open("wb") as file:
        for piece in pieces:
            path = bundle / piece["name"]
            if not path.is_file() or path.stat().st_size != piece["size"]:
                raise BundleError(f"{path.name} is missing or cut off: copy it beside the manifest")
            if sha256(path) != piece["sha256"]:
                raise BundleError(f"{path.name} is damaged: copy it again")
            file.write(path.read_bytes())


def unpack(bundle: Path, folder: Path) -> Path:
    """Unpack, unless it was done before.

    Returns:
        The folder with `site` (packages) and `repo` (benchmarks, training, tests).

    Raises:
        BundleError: a piece is missing or damaged, a file differs from the manifest.
    """
    manifest_file = bundle / "manifest.json"
    if not manifest_file.is_file():
        raise BundleError(f"no manifest.json in {bundle}; make the bundle with `make gpu-bundle`")
    text = manifest_file.read_bytes()
    manifest = json.loads(text)
    target = folder / hashlib.sha256(text).hexdigest()[:12]
    if (target / COMPLETE).exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    whole = target / "bundle.tar.xz"
    try:
        join(bundle, manifest["pieces"], whole)
        with tarfile.open(whole, mode="r:xz") as archive:
            for member in archive:
                if member.name not in manifest["files"] or not member.isfile():
                    raise BundleError(f"{member.name!r} is not in the manifest")
                archive.extract(member, target, filter="data")
    finally:
        whole.unlink(missing_ok=True)
    for name, known in manifest["files"].items():
        path = target / name
        if not path.is_file() or sha256(path) != known["sha256"]:
            raise BundleError(f"{name} differs from the manifest: delete {target} and try again")
    (target / COMPLETE).touch()
    return target


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        print(unpack(Path(sys.argv[1]), Path(sys.argv[2])))
    except IndexError:
        sys.exit(f"usage: python {sys.argv[0]} BUNDLE FOLDER")
    except BundleError as error:
        sys.exit(f"error: {error}")
