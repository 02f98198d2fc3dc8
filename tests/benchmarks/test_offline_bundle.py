# SPDX-License-Identifier: Apache-2.0
"""The bundle: what goes in, pieces under their limit, checksums, and the way back."""

import hashlib
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.offline import bundle
from benchmarks.offline.bundle import BundleError, Source, pack

ROOT = Path(__file__).resolve().parents[2]


def sources(seed=0, count=20, size=3000):
    rng = random.Random(seed)
    return [Source(f"site/pkg/{i:03d}.bin", rng.randbytes(size), i % 7 == 0) for i in range(count)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def unpack(folder, **environment):
    """run.sh of a bundle, whose `benchmarks.offline.run` is a stub; the process that ended."""
    env = {k: v for k, v in os.environ.items() if k not in ("BUNDLE", "PYTHONPATH")}
    env |= {"PYTHON": sys.executable, "OUT": "res", "WORK": "w", **environment}
    words = ["bash", str(folder / "run.sh"), "--quick", "steps"]
    return subprocess.run(words, cwd=folder.parent, env=env, capture_output=True, text=True)


STUB = [
    Source("repo/benchmarks/__init__.py", b""),
    Source("repo/benchmarks/offline/__init__.py", b""),
    Source("repo/benchmarks/offline/run.py", b"print('runs')"),
]


@pytest.mark.parametrize("limit", [1000, 16384, 1 << 20])
def test_pieces_keep_their_limit_and_come_back(tmp_path, limit):
    given = [*sources(), *STUB]
    assert pack(given, tmp_path / "b", limit=limit) == len(given)
    pieces = sorted((tmp_path / "b").glob("bundle.tar.xz.*"))
    assert (len(pieces) > 1) == (limit < 60000)
    sums = [line.split() for line in (tmp_path / "b" / "SHA256SUMS").read_text().splitlines()]
    assert sums == [[hashlib.sha256(p.read_bytes()).hexdigest(), p.name] for p in pieces]
    assert all(piece.stat().st_size == limit for piece in pieces[:-1])
    assert pieces[-1].stat().st_size <= limit
    assert unpack(tmp_path / "b").stdout == "runs\n"
    (target,) = (tmp_path / "w" / "bundle").iterdir()
    assert contents(target / "site") == {s.name.removeprefix("site/"): s.content for s in sources()}
    assert os.access(target / "site/pkg/000.bin", os.X_OK)
    assert not os.access(target / "site/pkg/001.bin", os.X_OK)
    # A second call reads nothing: the pieces may be gone.
    for piece in pieces:
        piece.unlink()
    assert unpack(tmp_path / "b").stdout == "runs\n"


def test_the_same_files_give_the_same_archive(tmp_path):
    for name in "ab":
        pack(sources(), tmp_path / name, limit=20000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pack(sources(seed=1), tmp_path / "a", limit=20000)
    assert contents(tmp_path / "a") != contents(tmp_path / "b")


def test_pieces_are_small_enough_to_be_copied():
    assert bundle.PIECE_BYTES <= 60 * 2**20


def test_a_missing_or_damaged_piece_is_named(tmp_path):
    pack([*sources(), *STUB], tmp_path / "b", limit=20000)
    victim = tmp_path / "b" / "bundle.tar.xz.01"
    content = victim.read_bytes()
    for damaged in (None, content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        victim.unlink() if damaged is None else victim.write_bytes(damaged)
        done = unpack(tmp_path / "b")
        assert done.returncode == 1 and victim.name in done.stderr + done.stdout
        assert "copy it again" in done.stderr
        assert not list((tmp_path / "w").rglob("run.py"))
    victim.write_bytes(content)
    assert unpack(tmp_path / "b").returncode == 0


def test_two_packages_with_one_file_are_refused(tmp_path):
    with pytest.raises(BundleError, match="site/x comes from two"):
        pack([Source("site/x", b"1"), Source("site/x", b"2")], tmp_path / "b")
    assert pack([Source("site/x", b"1"), Source("site/x", b"1")], tmp_path / "c") == 1


# What goes in.


@pytest.mark.parametrize(
    ("package", "name", "goes_in"),
    [
        ("vllm", "vllm/config/vllm.py", True),
        ("vllm", "vllm/_C_stable_libtorch.abi3.so", True),
        ("vllm", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", True),
        ("vllm", "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", False),
        ("vllm", "vllm/_moe_C_stable_libtorch.abi3.so", False),
        ("vllm", "vllm/vllm-rs", False),
        ("vllm", "vllm/third_party/deep_gemm/include/cute/a.hpp", False),
        ("vllm", "vllm-0.32.0.dist-info/METADATA", True),
        ("flashinfer_python", "flashinfer/prefill.py", True),
        ("flashinfer_python", "flashinfer/data/csrc/batch_prefill.cu", True),
        ("flashinfer_python", "flashinfer/data/csrc/fused_moe/x.cu", False),
        ("flashinfer_python", "flashinfer/data/csrc/xqa/mha.cu", True),
        ("flashinfer_python", "flashinfer/data/include/flashinfer/page.cuh", True),
        ("flashinfer_python", "flashinfer/data/cutlass/python/x.py", False),
        ("flashinfer_python", "flashinfer/moe_ep/kernel_src/x.cu", False),
        ("pyzmq", "zmq/backend/cython/_zmq.abi3.so", True),
    ],
)
def test_what_goes_in(package, name, goes_in):
    assert bundle.wanted(package, name) == goes_in


def test_files_of_a_wheel_lie_as_installed(tmp_path):
    wheel = tmp_path / "some_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/__init__.py", "x")
        archive.writestr("some_thing-1.0.data/purelib/thing/b.py", "y")
        archive.writestr("some_thing-1.0.data/scripts/thing", "z")
        archive.writestr("some_thing-1.0.dist-info/METADATA", "m")
    found = {s.name: s.content for s in bundle.wheel_files(wheel)}
    assert found == {
        "site/thing/__init__.py": b"x",
        "site/thing/b.py": b"y",
        "site/some_thing-1.0.dist-info/METADATA": b"m",
    }


def test_the_repository_part_can_run_and_is_small():
    found = {s.name: s for s in bundle.repository_files(ROOT)}
    for name in ("benchmarks/offline/run.py", "training/configs/tiny.yaml", "pyproject.toml"):
        assert f"repo/{name}" in found
    assert not [name for name in found if "/results/" in name]
    assert found["repo/benchmarks/offline/run.sh"].executable
    assert sum(len(s.content) for s in found.values()) < 8 << 20


def test_packages_are_named_once():
    names = [r.partition("==")[0] for r in bundle.LACKING]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(==[0-9.]+)?", r) for r in bundle.LACKING)
    assert len(set(names)) == len(names)


def test_without_a_checkout_the_remedy_is_named(tmp_path):
    with pytest.raises(BundleError, match="checkout"):
        list(bundle.repository_files(tmp_path))


# On the host.


def test_one_command_unpacks_and_runs(tmp_path):
    """run.sh with a bundle whose `benchmarks.offline.run` says what it was given."""
    stub = (
        "import os, sys, marker\n"
        "print(marker.__file__)\n"
        "print(sys.argv[1:])\n"
        "print(os.environ['HF_HUB_OFFLINE'], os.environ['TRITON_CACHE_DIR'])\n"
    )
    given = [*STUB[:2], Source(STUB[2].name, stub.encode()), Source("site/marker.py", b"")]
    pack(given, tmp_path / "b")
    done = unpack(tmp_path / "b")
    assert done.returncode == 0, done.stderr
    marker, arguments, variables = done.stdout.splitlines()
    assert marker.startswith(str(tmp_path / "w" / "bundle")) and "/site/" in marker
    want = ["--out", str(tmp_path / "res"), "--quick", "steps"]
    assert arguments == str(want)
    assert variables == f"1 {tmp_path / 'w' / 'triton'}"
