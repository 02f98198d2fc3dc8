# SPDX-License-Identifier: Apache-2.0
"""Unpack a bundle and check every file of it. Standard library only: nothing is installed yet.

python unpack.py BUNDLE FOLDER    # prints where the bundle lies, FOLDER/SHA
"""

import hashlib
import io
import json
import lzma
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

COMPLETE = ".complete"


class BundleError(Exception):
    """A bundle that is not whole, with what to do."""


class Joined(io.RawIOBase):
    """Several files as one, read in order; the checksum of each is compared on the way."""

    def __init__(self, bundle: Path, pieces: list) -> None:
        self.bundle, self.pieces = bundle, list(pieces)
        self.file: Any = None
        self.piece: dict = {}
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self.file is None:
                if not self.pieces:
                    return 0
                self.piece = self.pieces.pop(0)
                self.file = (self.bundle / self.piece["name"]).open("rb")
                self.digest = hashlib.sha256()
            count = self.file.readinto(buffer)
            if count:
                self.digest.update(memoryview(buffer)[:count])
                return count
            self.file.close()
            self.file = None
            if self.digest.hexdigest() != self.piece["sha256"]:
                raise BundleError(f"{self.piece['name']} is damaged: copy it again")


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
    for piece in manifest["pieces"]:
        path = bundle / piece["name"]
        if not path.is_file() or path.stat().st_size != piece["size"]:
            raise BundleError(f"{piece['name']} is missing or cut off: copy it beside the manifest")
    target.mkdir(parents=True, exist_ok=True)
    joined = io.BufferedReader(Joined(bundle, manifest["pieces"]), 1 << 20)
    try:
        with tarfile.open(fileobj=joined, mode="r|xz") as archive:
            for member in archive:
                if member.name not in manifest["files"] or not member.isfile():
                    raise BundleError(f"{member.name!r} is not in the manifest")
                archive.extract(member, target, filter="data")
        # Compression may end before the last piece does: read on, so that it is checked too.
        while joined.read(1 << 20):
            pass
    except (lzma.LZMAError, tarfile.TarError, EOFError, zlib.error) as error:
        raise BundleError(f"a piece is damaged ({error}): copy the bundle again") from error
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
