# SPDX-License-Identifier: Apache-2.0
"""The speed/score frontier of the three thresholds, the block size and the window's width.

    python -m benchmarks.sweep --json benchmarks/results/sweep.json   # the paper's grid
    python -m benchmarks.sweep --grid full --json sweep.json          # every combination
    python -m benchmarks.sweep --quick                                # a few points, seconds

One engine serves all points: settings travel with each request (`vllm_xargs`, d2f_*). Every point
answers the same problems, at batch size 1 like the paper unless told otherwise. All points are
measured once before any is measured again, so a slow minute of the machine hits them alike. Each
measurement is a line in a .jsonl file beside --json: a run that was stopped goes on where it was.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweep_report import build_report, markdown, plot
from benchmarks.workload import (
    Item,
    UsageError,
    environment,
    load_items,
    refuse_simulated,
    resolve_model,
    write_result,
)
from vllm_d2f.d2f import D2FParams

TAU_CONF = (0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
TAU_ADD = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)
TAU_ACT = (0.7, 0.85, 0.95, 0.99)
BEYOND = (0.1, 0.3, 0.5)
"""tau_conf below the paper's range: where a model that is sure of itself begins to err."""
BLOCK_SIZES = (8, 16, 32)
MAX_BLOCKS = (1, 2, 4)


def paper_grid(base: D2FParams) -> list[D2FParams]:
    """The paper's figure 2 and tables 3 and 4 around the model's own settings, and the blocks."""
    size, blocks = base.block_size, base.max_blocks
    figure_2 = [
        D2FParams(size, blocks, 0.1, act, conf) for conf in (*BEYOND, *TAU_CONF) for act in TAU_ACT
    ]
    table_3 = [
        D2FParams(size, blocks, add, tau, tau) for tau in (0.85, 0.9, 0.95) for add in TAU_ADD
    ]
    shapes = [
        D2FParams(size, blocks, base.tau_add, base.tau_act, base.tau_conf)
        for size, blocks in itertools.product((4, *BLOCK_SIZES), MAX_BLOCKS)
    ]
    return _unique([base, *figure_2, *table_3, *shapes])


def full_grid(base: D2FParams) -> list[D2FParams]:
    """Every combination of the issue's ranges."""
    axes = (BLOCK_SIZES, MAX_BLOCKS, TAU_ADD, TAU_ACT, TAU_CONF)
    return _unique([base, *(D2FParams(*point) for point in itertools.product(*axes))])


def quick_grid(base: D2FParams) -> list[D2FParams]:
    """The model's own settings, a cautious and a bold point, and one block at a time."""
    size, blocks = base.block_size, base.max_blocks
    return _unique(
        [
            base,
            D2FParams(size, blocks, 0.9, 0.99, 0.99),
            D2FParams(size, blocks, 0.05, 0.7, 0.1),
            D2FParams(4, 1, base.tau_add, base.tau_act, base.tau_conf),
        ]
    )


GRIDS = {"paper": paper_grid, "full": full_grid, "quick": quick_grid}


def _unique(points: Iterable[D2FParams]) -> list[D2FParams]:
    return list(dict.fromkeys(points))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One point, answered once.

    Attributes:
        exact, final: answers that are right to the letter, and in their last number.
        wrong: the problems that are not exact, to compare points problem by problem.
        useful: tokens up to the end token, it included, of all answers.
        forwards: forwards the requests took part in, summed.
        seconds: wall time of all batches.
        cpu_seconds: CPU time of this process, engine included; what the work costs on a machine
            that others use too.
    """

    params: dict[str, Any]
    repeat: int
    problems: int
    exact: int
    final: int
    wrong: list[int]
    useful: int
    forwards: int
    seconds: float
    cpu_seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self.params.values(), self.repeat)


class Record:
    """The measurements so far, in a file with one JSON object per line.

    The first line says what was measured. A last line that was cut off is measured again.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[tuple[Any, ...], Measurement] = {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        objects = [found for line in lines if (found := _parsed(line)) is not None]
        if objects and objects[0] != header:
            known, now = objects[0], header
            other = sorted(k for k in {*known, *now} if known.get(k) != now.get(k))
            raise UsageError(
                f"{path} holds measurements of something else ({', '.join(other)} differ); pass "
                "another --json, or --restart to throw them away"
            )
        for found in objects[1:]:
            measurement = Measurement(**found)
            self.done[measurement.key] = measurement
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, so that a line that was cut off is gone.
        kept = [header, *(asdict(m) for m in self.done.values())]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, measurement: Measurement) -> None:
        self.done[measurement.key] = measurement
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(measurement)) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def weights_digest(model: str) -> str | None:
    """Tells a checkpoint from the same folder with other weights; None for a Hub id."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(file.read(1 << 22))
        digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()[:16] if files else None


def ask(
    engine: Any, params: D2FParams, repeat: int, items: Sequence[Item], batch: int
) -> Measurement:
    """Answer all items with the given settings."""
    from vllm import SamplingParams

    engine.sampling = SamplingParams(
        temperature=0.0,
        max_tokens=engine.sampling.max_tokens,
        extra_args={f"d2f_{name}": value for name, value in asdict(params).items()},
    )
    batches = engine.measure(items, batch)
    answers = [answer for one in batches for answer in one.answers]
    return Measurement(
        params=asdict(params),
        repeat=repeat,
        problems=len(answers),
        exact=sum(a.exact for a in answers),
        final=sum(a.final for a in answers),
        wrong=[a.item for a in answers if not a.exact],
        useful=sum(a.useful for a in answers),
        forwards=sum(a.forwards for a in answers),
        seconds=round(sum(one.seconds for one in batches), 4),
        cpu_seconds=round(sum(one.cpu_s for one in batches), 4),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="d2f-tiny", help="embedded name, folder or Hub id")
    parser.add_argument("--grid", choices=list(GRIDS), default="paper")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--data", help='JSONL with "question" and "answer" per line')
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="4 points, 10 problems, once")
    parser.add_argument("--restart", action="store_true", help="forget earlier measurements")
    parser.add_argument("--json", help="write .json, .jsonl, .md and .png under this name")
    args = parser.parse_args(argv)
    if args.quick:
        args.grid, args.problems, args.repeats = "quick", 10, 1
    return args


def run(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Measure what is not measured yet, and report on everything."""
    from tqdm import tqdm
    from transformers import AutoConfig

    from vllm_d2f import register
    from vllm_d2f.settings import settings_from_dict

    register()
    model = resolve_model("--model", args.model)
    items = load_items(args.problems, args.data, args.seed)
    config = AutoConfig.from_pretrained(model)
    refuse_simulated(f"--model {args.model}", config, "a speed/score frontier")
    section = getattr(config, "d2f", None)
    if section is None:
        raise UsageError(f"--model {args.model} is no D2F model: its config has no d2f section")
    base = settings_from_dict(section).params
    points = GRIDS[args.grid](base)
    header = {
        "model": args.model if not Path(args.model).exists() else Path(args.model).name,
        "weights": weights_digest(model),
        "data": Path(args.data).name if args.data else "training.arithmetic test",
        **{name: getattr(args, name) for name in ("problems", "max_tokens", "batch_size", "seed")},
    }
    path = Path(args.json).with_suffix(".jsonl") if args.json else None
    if args.restart and path is not None:
        path.unlink(missing_ok=True)
    record = Record(path, header)
    todo = [
        (params, repeat)
        for repeat in range(args.repeats)
        for params in points
        if (*asdict(params).values(), repeat) not in record.done
    ]
    about = environment(args.seed, argv, "benchmarks.sweep")
    if todo:
        engine = _engine(args, model, max(p.window for p in points))
        ask(engine, base, 0, items[:8], args.batch_size)  # warm-up
        for params, repeat in tqdm(todo, desc="sweep", disable=None):
            record.add(ask(engine, params, repeat, items, args.batch_size))
    wanted = {tuple(asdict(p).values()) for p in points}
    kept = [m for m in record.done.values() if m.key[:-1] in wanted]
    return build_report({**about, **header}, asdict(base), [asdict(m) for m in kept])


def _engine(args: argparse.Namespace, model: str, window: int) -> Any:
    from benchmarks.engine import Engine
    from benchmarks.workers import most_modes

    options = {
        "max_model_len": args.max_model_len,
        "additional_config": {"d2f": {"window": window}},
    }
    return Engine(
        model,
        mode=most_modes()[0],
        max_batch=args.batch_size,
        max_tokens=args.max_tokens,
        options=options,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    started = time.perf_counter()
    try:
        report = run(args, sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_result(report, markdown(report), args.json)
    if args.json:
        plot(report, Path(args.json).with_suffix(".png"))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
