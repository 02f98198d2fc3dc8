# SPDX-License-Identifier: Apache-2.0
"""Check what this package runs on a GPU: is it installed, is it right, and how fast is it?

    python -m benchmarks.kernels --json kernels.json

`found`: what is installed and what the device is. `tests/FOLDER`: the tests marked `gpu`, which
compare the FlashInfer backend and the kernels with float64, and the engine with the authors' own
runs. `confidence/MODEL/RULE/ROWS`: the confidence kernel at the vocabularies of Dream and LLaDA;
its floor reads the logits once.
"""

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import record, timing
from benchmarks.harness.cost import floor
from benchmarks.harness.record import Record, Skip

VOCABULARIES = {"dream": 152064, "llada": 126464}
RULES: dict[str, dict[str, float]] = {
    "greedy": {}, "temperature": {},
    "top_k": {"top_k_R": 50}, "top_p": {"top_p_R": 0.9}, "min_p": {"min_p_R": 0.05},
}  # fmt: skip


def found(device: torch.device) -> dict[str, Any]:
    """Return the versions of the packages that a GPU needs, and the device."""
    there: dict[str, Any] = {}
    for name in ("vllm", "vllm._custom_ops", "flashinfer", "triton", "transformers", "vllm_d2f"):
        try:
            there[name] = str(getattr(importlib.import_module(name), "__version__", "there"))
        except Exception as error:  # a missing package is a result
            there[name] = f"missing: {type(error).__name__}: {str(error)[:200]}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        there["memory_gib"] = round(properties.total_memory / 2**30, 1)
        there["capability"] = f"{properties.major}.{properties.minor}"
    return there


def confidence(size: int, rows: int, rule: str, machine: Mapping[str, float]) -> dict[str, Any]:
    """Return the kernel's time against reading the logits once."""
    if not torch.cuda.is_available():
        raise Skip("Triton needs a CUDA device; see tests/sampling")
    from vllm_d2f.sampling import confidence_kernel
    from vllm_d2f.sampling.sample import Sampling

    device = torch.device("cuda")
    inputs = []
    for seed in range(timing.copies(2 * size * rows, device)):
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(rows, size, generator=generator, device=device)
        inputs.append((3 * logits).to(torch.bfloat16))
    extra: tuple[Any, ...] = ()
    if rule != "greedy":
        how, counters = Sampling.greedy(rows, device), torch.arange(rows, device=device)
        how.temperature_R[:], how.seed_R[:] = 0.8, counters * 7919
        for name, value in RULES[rule].items():
            getattr(how, name)[:] = value
        extra = (how, counters, counters % 7)
    runs = [lambda x=x: confidence_kernel.sample(x, size - 5, *extra) for x in inputs]
    times = timing.measure({"": runs}, device)[""]
    floor_ms = floor(2 * size * rows, 0, machine)[0]
    ratio = round(times["ms"] / floor_ms, 2)
    return {**times, "floor_ms": round(floor_ms, 5), "times_floor": ratio}


def tests(folder: str) -> dict[str, Any]:
    """Run the tests of a folder that need a device."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run([*words, *device_tests(folder)], capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:])
    return counts_of(done.stdout, done.returncode)


def device_tests(folder: str) -> list[str]:
    """Return the files with tests that need a device.

    Others are not even collected: a bundle lacks what some of them read when they are imported.
    """
    files = sorted(Path(folder).rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def counts_of(output: str, code: int) -> dict[str, Any]:
    """Return counts from pytest's last line; an AssertionError names what failed."""
    if not output.strip():
        raise Skip("pytest is not installed on the host")
    kinds = r"(\d+) (passed|failed|skipped|deselected|error)"
    counts = {kind: int(n) for n, kind in re.findall(kinds, output.splitlines()[-1])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if failed or code not in (0, 5):
        raise AssertionError(f"pytest ended with {code}: {counts}; {', '.join(failed)[:400]}")
    return {"exit_code": code, **counts}


def markdown(report: Mapping[str, Any]) -> list[str]:
    timed = {key: p for key, p in report["points"].items() if key.startswith("confidence/")}
    return [
        *record.head("Kernels on the device", report),
        *(f"- {key}: {p}" for key, p in report["points"].items() if key not in timed),
        "",
        *record.columns(
            "key ms floor_ms times_floor", ({"key": key, **p} for key, p in timed.items())
        ),
        *record.misses(report),
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("kernels", __doc__)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1, 32, 128, 1024], help="masked positions")
    folders = ["attention", "sampling", "worker", "engine"]
    add("--tests", nargs="*", default=folders, help="folders of tests/")
    args = parser.finish(argv, {"rows": [32]}, ("rows",), rehearse=True)
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device; --rehearse runs what runs on a CPU")
    return args


def kernels(run: Record) -> int:
    """Check and time everything. Return 1 if anything fails."""
    args = run.args
    on, dtype = ("cpu", torch.float32) if args.rehearse else ("cuda", torch.bfloat16)
    device = torch.device(on)
    run.point("found", partial(found, device), may_fail=True)
    for folder in args.tests:
        run.point(f"tests/{folder}", partial(tests, f"tests/{folder}"), may_fail=True)
    machine = run.point("machine", partial(timing.machine, device, dtype), may_fail=True)
    for model, size in VOCABULARIES.items():
        for rows in args.rows:
            for rule in RULES:
                measure = partial(confidence, size, rows, rule, machine)
                run.point(f"confidence/{model}/{rule}/{rows}", measure, may_fail=True)
    run.write(run.report(rehearse=args.rehearse, points=run.points))
    return int(bool(run.failed))


main = record.command(parse, kernels, markdown)

if __name__ == "__main__":
    sys.exit(main())
