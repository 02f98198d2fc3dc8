# SPDX-License-Identifier: Apache-2.0
"""Pack what an offline CUDA host lacks: `make gpu-bundle`.

    python -m benchmarks.offline.bundle --out build/gpu-bundle

The host has Python, torch for CUDA, Triton, transformers and nvcc, and no network. Into the bundle
go the parts of vLLM and FlashInfer that dense models need, packages that the host lacks, this
package and its benchmarks. Wheels come from pip's package index and are kept in `--wheels`. The
result is one archive in pieces, the SHA-256 of every piece, and run.sh, which checks, unpacks and
runs it. The same wheels and sources give the same archive. Compiled code is carried for every
architecture that vLLM is built for, so the pieces are several.
"""

import argparse
import fnmatch
import hashlib
import io
import itertools
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.record import Parser
from vllm_d2f.output import OutputError, check_output

ROOT = Path(__file__).resolve().parents[2]
PIECE_BYTES = 60 << 20
"""Most of a piece: what can be copied to the host at once is little more."""
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux{version}_x86_64" for version in ("_2_31", "_2_28", "_2_17", "2014"))

VLLM, FLASHINFER = "vllm==0.32.0", "flashinfer-python==0.7.0.post1"

LACKING = Path(__file__).with_name("lacking.txt").read_text("utf-8").partition("\n")[2].split()
"""Packages that vLLM 0.32, training and tests need besides torch, Triton and transformers."""

DROPPED = {
    "vllm": (
        "vllm/vllm-rs",
        "vllm/third_party/fmha_sm100/cutlass/*",
        "vllm/third_party/deep_gemm/include/*",
        "vllm/third_party/tml_fa4/*",
        "vllm/model_executor/layers/fused_moe/configs/*",
        "vllm/model_executor/layers/quantization/utils/configs/*",
        "vllm/kernels/helion/configs/*",
        "vllm/entrypoints/serve/instrumentator/static/*",
    ),
    "flashinfer_python": ("flashinfer/moe_ep/kernel_src/*",),
}
"""By package; `*` matches across folders."""

LIBRARIES = {
    f"{name}.abi3.so"
    for name in ["_C_stable_libtorch", "cumem_allocator", "spinloop", "fs_io_C", "_vllm_fa3_C"]
}
"""Compiled parts of vLLM that stay; the others serve MoE models and other devices."""

DATA = (
    *("include/*", "cutlass/include/*", "cutlass/tools/util/include/*", "cccl/*"),
    *("spdlog/include/*", "csrc/xqa/*"),
)
"""Of `flashinfer/data`, beside the sources at the top of `csrc`."""

REPOSITORY = ("benchmarks", "training", "tests")
"""What the host runs from this repository's sources, with pyproject.toml for pytest."""


class BundleError(Exception):
    """The bundle cannot be made, with the remedy."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the bundle: its name there, and how to read it."""

    name: str
    content: bytes
    executable: bool = False


def wanted(package: str, name: str) -> bool:
    """Return whether a file of a wheel goes into the bundle."""
    if any(fnmatch.fnmatch(name, pattern) for pattern in DROPPED.get(package, ())):
        return False
    base = name.rsplit("/", 1)[-1]
    if package == "vllm" and re.search(r"\.so(\.\d+)*$", base):
        return base in LIBRARIES
    inside = name.removeprefix("flashinfer/data/")
    if package == "flashinfer_python" and inside != name:
        top = inside.startswith("csrc/") and inside.count("/") == 1
        return top or any(fnmatch.fnmatch(inside, pattern) for pattern in DATA)
    return True


def wheel_files(wheel: Path) -> Iterator[Source]:
    """Yield the wanted files of a wheel at their places after installation, without scripts."""
    package = wheel.name.split("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("/"):
                continue
            installed = name
            if match := re.match(r"[^/]+\.data/([^/]+)/(.*)", name):
                if match[1] not in ("purelib", "platlib"):
                    continue
                installed = match[2]
            if not wanted(package, installed):
                continue
            yield Source(f"site/{installed}", archive.read(name))


def repository_files(root: Path) -> Iterator[Source]:
    """Yield the files that git tracks of what the host runs, without results and pictures."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard",
             "--", *REPOSITORY, "pyproject.toml"],
            capture_output=True, check=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise BundleError(f"git ls-files in {root}: {error}; run it from a checkout") from None
    for name in sorted(set(done.stdout.split("\0")) - {""}):
        path = root / name
        skipped = name.startswith(("benchmarks/results/", "training/adapters/"))
        if path.is_file() and not skipped and "-lora/" not in name:
            yield Source(f"repo/{name}", path.read_bytes(), bool(path.stat().st_mode & 0o100))


def pack(sources: Iterable[Source], out: Path, limit: int = PIECE_BYTES, preset: int = 3) -> int:
    """Write pieces of at most `limit` bytes, their checksums and run.sh. Return how many files."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("run.sh"), out)  # first: it is the mark of `check_output`
    files: dict[str, str] = {}
    whole = out / "bundle.tar.xz"
    with (
        lzma.open(whole, "wb", preset=preset) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for source in sources:
            digest = hashlib.sha256(source.content).hexdigest()
            if known := files.get(source.name):
                if known == digest:
                    continue
                raise BundleError(f"{source.name} comes from two packages; drop one of them")
            info = tarfile.TarInfo(source.name)
            info.size, info.mode = len(source.content), 0o755 if source.executable else 0o644
            archive.addfile(info, io.BytesIO(source.content))
            files[source.name] = digest
    sums: list[str] = []
    with whole.open("rb") as file:
        while content := file.read(limit):
            name = f"{whole.name}.{len(sums):02d}"
            (out / name).write_bytes(content)
            sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    whole.unlink()
    (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return len(files)


def download(wheels: Path, root: Path, python: str) -> list[Path]:
    """Return the wheels of the host's packages and of this one; pip downloads what is missing."""
    wheels.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    abis = (f"cp{python.replace('.', '')}", "abi3", "none")
    tags = [word for abi in abis for word in ("--abi", abi)]
    _pip(
        ["download", "--no-deps", "--only-binary", ":all:", "--python-version", python, *platforms]
        + [*tags, "--implementation", "cp", "-d", str(wheels), VLLM, FLASHINFER, *LACKING]
    )
    for old in wheels.glob("vllm_d2f-*.whl"):
        old.unlink()
    _pip(["wheel", "--no-deps", "-w", str(wheels), str(root)])
    chosen = []
    for requirement in (VLLM, FLASHINFER, *LACKING, "vllm-d2f"):
        name, _, version = requirement.partition("==")
        stem = re.sub(r"[-_.]+", "[-_.]", re.escape(name).replace(r"\-", "-"))
        pattern = re.compile(rf"{stem}-{re.escape(version) or '[^-]+'}-", re.IGNORECASE)
        found = sorted(path for path in wheels.glob("*.whl") if pattern.match(path.name))
        if len(found) != 1:
            names = [path.name for path in found]
            raise BundleError(f"{requirement}: {names or 'no wheel'} in {wheels}; empty the folder")
        chosen += found
    return chosen


def _pip(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "-q", "--disable-pip-version-check"]
    )
    if done.returncode:
        raise BundleError(
            f"pip {words[0]} failed: the index must offer {VLLM} (CUDA build), {FLASHINFER} and "
            "the packages of benchmarks/offline/lacking.txt; name one with PIP_EXTRA_INDEX_URL, or "
            "put the wheels into a folder and set PIP_FIND_LINKS"
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("offline.bundle", __doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-bundle"))
    parser.add_argument("--wheels", type=Path, default=Path("build/gpu-wheels"))
    parser.add_argument("--python", default=PYTHON, help="the host's version (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        check_output(args.out, "run.sh")
        wheels = download(args.wheels, ROOT, args.python)
        from_wheels = (source for wheel in wheels for source in wheel_files(wheel))
        count = pack(itertools.chain(from_wheels, repository_files(ROOT)), args.out)
    except (BundleError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sizes = [piece.stat().st_size for piece in args.out.glob("bundle.tar.xz.*")]
    print(
        f"{args.out}: {len(sizes)} pieces, {sum(sizes) / 1e6:.1f} MB, {count} files; on the host: "
        f"bash {args.out.name}/run.sh"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
