# SPDX-License-Identifier: Apache-2.0
"""What each choice of the method does: `python -m training.experiments`.

Every variant starts from the same weights (`--teacher`), is trained with several seeds, and is
decoded with the reference loop at several thresholds. Each result is kept at once; running the
command again continues. A stage that a variant starts from instead (`start`) is trained once.

The data are generated problems, or records of a file. Then `data.validation` holds the questions,
and the score is exact match or the job's own, with an interval over answers and seeds.

    python -m training.experiments --config training/configs/experiments.yaml \\
        --teacher build/tiny/teacher/final.safetensors --out build/experiments \\
        --results benchmarks/results/training_experiments
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from accelerate import Accelerator

from training import evaluate, extract
from training.arithmetic import problems
from training.attention import chosen_attention
from training.config import Config, ConfigError, make_config, merged
from training.data import Example, check_source, encode_problems, validation
from training.export import save_weights
from training.intervals import difference, interval
from training.model import PrefixCache, open_base
from training.report import machine, read_lines, read_log, versions
from training.trainer import Data, Run, fingerprint_files, fit, same_inputs, set_up
from vllm_d2f.output import check_output

GRADERS: dict[str, Callable[[str, str], float]] = {
    "exact": lambda right, found: float(right == found),
    "slots": extract.slots,
}
"""Score of a found answer, from 0 to 1, given the right one."""

FIRST = "teacher"
"""The stage that is never trained here: its weights are those of `--teacher`."""


@dataclass(frozen=True)
class Plan:
    """The experiments of a YAML file.

    Attributes:
        config: a run with the stages `teacher` and `student`.
        variants: their changes of the stage `student`.
        groups: variants that belong together.
        problems: how many are decoded.
        score: of answers to the questions of a file, one of `GRADERS`.
        drawn: the seed with which questions are drawn from a file; None: the first ones.
    """

    config: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    thresholds: tuple[float, ...]
    problems: int
    title: str = "What the choices of D2F training do, on the tiny model"
    score: str = "exact"
    drawn: int | None = None

    @property
    def of_records(self) -> bool:
        """Whether questions and answers come from a file."""
        return self.config.get("data", {}).get("source", "arithmetic") != "arithmetic"

    def of(self, name: str, seed: int) -> Config:
        changes = {"stages": {"student": {**self.variants[name], "seed": seed}}}
        values = merged(self.config, changes)
        loss = values["stages"]["student"].get("loss", {})
        if loss.get("prompt_attention") == "block_causal" and "block_size" in loss:
            # Such a model is decoded in the blocks that it was trained with.
            values = merged(values, {"decoding": {"block_size": loss["block_size"]}})
        return make_config(values, f"variant {name}")

    def trained_block(self, name: str) -> int:
        return self.of(name, 0).stages["student"].loss.block_size

    def shown_blocks(self, group: dict[str, Any], name: str) -> list[int]:
        """Return the block sizes that a group decodes with: those it names or the trained one."""
        return list(group.get("decode", ())) or [self.trained_block(name)]

    def block_sizes(self, name: str) -> list[int]:
        """Return the block sizes to decode with: the trained one, and those of its groups."""
        trained = self.trained_block(name)
        more = [
            b for g in self.groups.values() if name in g["variants"] for b in g.get("decode", ())
        ]
        return sorted({trained, *more})

    def compared(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the groups of which at least two variants have results."""
        there = {row["variant"] for row in rows}
        return {t: g for t, g in self.groups.items() if len(there & set(g["variants"])) > 1}

    def fingerprint(self, name: str) -> str:
        """Return the sha256 of the settings that decide a variant's results."""
        decoded: tuple[Any, ...] = (self.thresholds, self.problems, self.block_sizes(name))
        if self.of_records:
            decoded = (*decoded, self.drawn)
        decided = f"{self.of(name, 0).model_dump_json()} {decoded}"
        return hashlib.sha256(decided.encode()).hexdigest()


def load_plan(path: Path) -> Plan:
    values = yaml.safe_load(path.read_text())
    try:
        plan = Plan(
            values["config"],
            values["variants"],
            values["groups"],
            tuple(values["seeds"]),
            tuple(values["thresholds"]),
            values["problems"],
            values.get("title", Plan.title),
            values.get("score", Plan.score),
            values.get("drawn"),
        )
    except KeyError as error:
        raise ConfigError(f"{path}: {error} is missing") from None
    if plan.score not in GRADERS:
        raise ConfigError(f"{path}: score: {plan.score!r} is none of {sorted(GRADERS)}")
    for title, group in plan.groups.items():
        if unknown := set(group["variants"]) - set(plan.variants):
            raise ConfigError(f"{path}: groups.{title}: unknown variants {sorted(unknown)}")
    for name in plan.variants:
        plan.of(name, 0)  # find a bad value before hours of training
    return plan


def start_of(plan: Plan, name: str, seed: int, teacher: Path, out: Path) -> Path:
    """Return the weights that a variant starts from; a stage of its own is trained if it is not."""
    config = plan.of(name, seed)
    start = config.stages["student"].start or FIRST
    weights = out / start / "final.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    if weights.exists():
        return weights
    if start == FIRST:
        shutil.copy(teacher, weights.with_suffix(".part"))
    else:
        before = plan.of(name, seed).stages[start].start
        if before != FIRST:
            raise ConfigError(f"stages.{start}.start: must be {FIRST}, not {before}")
        first = out / FIRST / "final.safetensors"
        if not first.exists():
            first.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(teacher, first)
        run = prepared(config, start, out)
        fit(run)
        save_weights(run.predictor.net, weights.with_suffix(".part"))
        run.accelerator.free_memory()
    weights.with_suffix(".part").rename(weights)
    return weights


def prepared(config: Config, stage: str, out: Path) -> Run:
    """Set a stage up, with data that are read once."""
    accelerator = Accelerator()
    attention = chosen_attention(config.model.attention, accelerator.device)
    block = config.stages[stage].loss.block_size
    key = f"{config.model.base} {config.data.model_dump_json()} {block}"
    if key not in READ:
        READ[key] = Data.read(config, stage, open_base(config.model))
    return set_up(config, stage, out, accelerator, attention, READ[key])


READ: dict[str, Data] = {}
"""Examples by model, data and block size: reading many records takes longer than some updates."""


def run_one(plan: Plan, name: str, seed: int, teacher: Path, out: Path) -> dict[str, Any]:
    """Train and decode one student."""
    config = plan.of(name, seed)
    # The student starts from, and learns from, the same teacher every time.
    start = start_of(plan, name, seed, teacher, out)
    folder = out / f"{name}-{seed}.part"
    check_output(folder, f"{start.parent.name}/final.safetensors", text="")
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted one begins again, for some minutes
    student = config.stages["student"]
    # `set_up` looks for both stages side by side.
    folder.mkdir(parents=True)
    (folder / start.parent.name).symlink_to(start.parent.resolve())
    run = prepared(config, "student", folder)
    began = time.monotonic()
    fit(run)
    trained = time.monotonic() - began
    run.predictor.eval()
    if student.lora is not None:
        run.predictor.net.merge_adapter()  # what is served
    examples = questions(plan, run)
    began = time.monotonic()
    scores = [
        {"block_size": block, "tau_conf": tau, **figures(plan, run, examples, block, tau)}
        for block in plan.block_sizes(name)
        for tau in plan.thresholds
    ]
    log = read_log(run.directory)
    shutil.rmtree(folder)
    run.accelerator.free_memory()
    result = {
        "variant": name,
        "seed": seed,
        "trained_block_size": student.loss.block_size,
        "loss_content": log[-1]["loss_content"],
        "train_seconds": round(trained, 1),
        "decode_seconds": round(time.monotonic() - began, 1),
        "scores": scores,
    }
    if start.parent.name != FIRST:
        result["start_seconds"] = read_log(start.parent)[-1]["seconds"]
    return result


def questions(plan: Plan, run: Run) -> list[Example]:
    """Return what is decoded: generated problems, or records of `data.validation`."""
    data, tokenizer = run.config.data, run.loaded.tokenizer
    if not plan.of_records:
        items = problems("test", plan.problems, "experiments", data.step_counts)
        return encode_problems(items, tokenizer)
    found = validation(data, tokenizer, run.stage.loss.block_size, sys.maxsize)
    if plan.drawn is not None:
        random.Random(plan.drawn).shuffle(found)
    if len(found) < plan.problems:
        raise ConfigError(f"data.validation: {len(found)} records, {plan.problems} are needed")
    return found[: plan.problems]


def figures(
    plan: Plan, run: Run, examples: list[Example], block: int, tau: float
) -> dict[str, Any]:
    """Decode with the reference loop, and score; answers to records are scored one by one too."""
    decoding = run.config.decoding.model_copy(update={"block_size": block, "tau_conf": tau})
    tokenizer, ends, predictor = run.loaded.tokenizer, run.ends, run.predictor
    outputs, forwards = evaluate.d2f_outputs(
        PrefixCache(predictor) if plan.of_records else predictor, examples, ends,
        run.loaded.mask_id, decoding, run.prompt_block, run.stage.loss.block_origin,
    )  # fmt: skip
    whole = evaluate.score(examples, outputs, forwards, tokenizer, ends).as_dict()
    if not plan.of_records:
        return whole
    grade = GRADERS[plan.score]
    answers = [
        {
            "score": round(grade(example.text, evaluate.text_of(ids, tokenizer, ends)[0]), 4),
            "tokens": len(ids),
            "forwards": count,
        }
        for example, ids, count in zip(examples, outputs, forwards, strict=True)
    ]
    return {**whole, "answers": answers}


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def table(plan: Plan, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and deviation over the seeds, per variant, block size and threshold."""
    rows = []
    for name in plan.variants:
        own = [r for r in results if r["variant"] == name]
        for block in plan.block_sizes(name) if own else ():
            for tau in plan.thresholds:
                at = [
                    s for r in own for s in r["scores"]
                    if (s["block_size"], s["tau_conf"]) == (block, tau)
                ]  # fmt: skip
                if not at:
                    continue
                row = {
                    "variant": name,
                    "decode_block": block,
                    "tau_conf": tau,
                    "seeds": len(at),
                    "exact": spread([100 * s["exact"] for s in at]),
                    "tokens_per_forward": spread([s["tokens_per_forward"] for s in at]),
                }
                if plan.of_records:
                    answers = [answer for s in at for answer in s["answers"]]
                    pace = [(a["tokens"], a["forwards"]) for a in answers]
                    row["score"] = interval(counts(answers), runs=len(at))
                    row["tokens_per_forward_interval"] = interval(pace, runs=len(at))[1:]
                    row["train_seconds"] = mean(r["train_seconds"] for r in own)
                    row["start_seconds"] = max(r.get("start_seconds", 0) for r in own)
                rows.append(row)
    return rows


def counts(answers: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Return scores of answers, in per cent."""
    return [(100 * answer["score"], 1.0) for answer in answers]


def against(
    plan: Plan, results: list[dict[str, Any]], name: str, other: str, tau: float
) -> tuple[float, float, float] | None:
    """Return a variant's score less another's, with its interval, by the seeds that both have.

    Each is decoded with the blocks that it was trained with.
    """
    answers: list[list[dict[str, float]]] = [[], []]
    both = [{r["seed"]: r for r in results if r["variant"] == one} for one in (name, other)]
    seeds = sorted(both[0].keys() & both[1].keys())
    for found, runs in zip(answers, both, strict=True):
        for seed in seeds:
            block = runs[seed]["trained_block_size"]
            for one in runs[seed]["scores"]:
                if (one["block_size"], one["tau_conf"]) == (block, tau):
                    found += one["answers"]
    if not seeds or name == other:
        return None
    return difference(counts(answers[0]), counts(answers[1]), runs=len(seeds))


def write(
    plan: Plan, results: list[dict[str, Any]], path: Path, command: str, note: str = ""
) -> None:
    """Write `path`.json, .md and .png."""
    rows = table(plan, results)
    report = {
        "command": command,
        "note": note,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "plot": path.with_suffix(".png").name,
        "problems": plan.problems,
        "config": plan.config,
        "variants": plan.variants,
        "table": rows,
        "runs": results,
    }
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(plan, rows, report)
    path.with_suffix(".md").write_text(text)
    plot(plan, rows, path.with_suffix(".png"))


def markdown(plan: Plan, rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """Return a table per group, under the group's description."""
    made = ", ".join(f"{n} {v}" for n, v in report["versions"].items())
    seeds = ", ".join(map(str, plan.seeds))
    if plan.of_records:
        about = (
            f"{plan.problems} questions of the test file, seeds {seeds}. {plan.score.capitalize()} "
            "is the job's score in per cent, exact the whole answer with its end token, tpf tokens "
            "per forward up to the end token. Ranges are 95 % intervals over answers and seeds; "
            "the difference is that to the group's first variant, on the same questions and seeds. "
            "Seconds are those of the training alone, behind a + those of the weights it starts "
            "from, which are trained once."
        )
    else:
        about = (
            f"{plan.problems} held-out problems, seeds {seeds}; mean "
            "and standard deviation over the seeds. Exact match is the whole answer with its end "
            "token, in per cent; tpf is tokens per forward up to the end token."
        )
    lines = [
        f"# {plan.title}\n",
        f"`{report['command']}`, {report['machine']}, {report['date']}, {made}.\n",
        about + (f" {report['note']}" if report["note"] else "") + "\n",
        f"![score against speed]({report['plot']})\n",
    ]
    for title, group in plan.compared(rows).items():
        lines += [f"## {title}\n", group.get("text", "").strip() + "\n"]
        if plan.of_records:
            lines += _records(plan, rows, group, report)
        else:
            lines += _means(plan, rows, group)
        if result := group.get("result"):
            lines += ["", result.strip()]
        lines.append("")
    return "\n".join(lines)


def _means(plan: Plan, rows: list[dict[str, Any]], group: dict[str, Any]) -> list[str]:
    """Return the table of a group with generated problems: a column per threshold."""
    head = [f"tau_conf {tau}: exact, tpf" for tau in plan.thresholds]
    lines = [f"| variant | decoded with block | {' | '.join(head)} |"]
    lines.append("|---|---|" + "---|" * len(head))
    for name in group["variants"]:
        for block in plan.shown_blocks(group, name):
            cells = []
            for tau in plan.thresholds:
                row = _row(rows, name, block, tau)
                cells.append("" if row is None else _cell(row))
            lines.append(f"| {name} | {block} | {' | '.join(cells)} |")
    return lines


def _records(
    plan: Plan, rows: list[dict[str, Any]], group: dict[str, Any], report: dict[str, Any]
) -> list[str]:
    """Return the table of a group with records: a line per threshold."""
    head = ("variant", "block", "seeds", "seconds", "tau_conf", plan.score, "difference", "exact",
            "tpf")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in group["variants"]:
        for block in plan.shown_blocks(group, name):
            for tau in plan.thresholds:
                if (row := _row(rows, name, block, tau)) is None:
                    continue
                gap = against(plan, report["runs"], name, group["variants"][0], tau)
                more = "" if gap is None else f"{gap[0]:+.1f} [{gap[1]:+.1f}, {gap[2]:+.1f}]"
                middle, low, high = row["score"]
                pace, ends = row["tokens_per_forward"]["mean"], row["tokens_per_forward_interval"]
                before = f" + {row['start_seconds']:.0f}" if row["start_seconds"] else ""
                cells = (
                    name, block, row["seeds"], f"{row['train_seconds']:.0f}{before}", tau,
                    f"{middle:.1f} [{low:.1f}, {high:.1f}]", more, f"{row['exact']['mean']:.1f}",
                    f"{pace:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]",
                )  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _row(rows: list[dict[str, Any]], name: str, block: int, tau: float) -> dict[str, Any] | None:
    key = (name, block, tau)
    return next((r for r in rows if (r["variant"], r["decode_block"], r["tau_conf"]) == key), None)


def _cell(row: dict[str, Any]) -> str:
    exact, tpf = row["exact"], row["tokens_per_forward"]
    return f"{exact['mean']:.1f} ± {exact['sd']:.1f}, {tpf['mean']:.2f} ± {tpf['sd']:.2f}"


def plot(plan: Plan, rows: list[dict[str, Any]], path: Path) -> None:
    """Score against tokens per forward, a panel per group, a line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, columns = plan.compared(rows), 3
    lines = max(1, -(-len(groups) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(11, 2.9 * lines), squeeze=False)
    for at, (title, group) in enumerate(groups.items()):
        axis = axes[at // columns, at % columns]
        for name in group["variants"]:
            for block in plan.shown_blocks(group, name):
                line = [r for r in rows if (r["variant"], r["decode_block"]) == (name, block)]
                points = [_point(r) for r in line]
                axis.errorbar(
                    [p[0] for p in points],
                    [p[1] for p in points],
                    xerr=[[p[2][end] for p in points] for end in (0, 1)],
                    yerr=[[p[3][end] for p in points] for end in (0, 1)],
                    fmt="o-",
                    ms=3,
                    lw=1,
                    label=f"{name} @{block}" if "decode" in group else name,
                )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens per forward", fontsize=8)
        label = "exact match, %" if plan.score == "exact" else f"{plan.score}, %"
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6, frameon=False)
    for at in range(len(groups), lines * columns):
        axes[at // columns, at % columns].axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


Ends = tuple[float, float]


def _point(row: dict[str, Any]) -> tuple[float, float, Ends, Ends]:
    """Return speed and score of a row, and how far their ranges reach down and up."""
    pace = row["tokens_per_forward"]
    if "score" not in row:
        exact = row["exact"]
        return pace["mean"], exact["mean"], (pace["sd"],) * 2, (exact["sd"],) * 2
    (middle, low, high), ends = row["score"], row["tokens_per_forward_interval"]
    reach = (max(pace["mean"] - ends[0], 0), max(ends[1] - pace["mean"], 0))
    return pace["mean"], middle, reach, (middle - low, high - middle)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("training/configs/experiments.yaml"))
    parser.add_argument(
        "--teacher", type=Path, required=True, help="final.safetensors of a teacher"
    )
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--results", type=Path, required=True, help="report, without suffix")
    parser.add_argument("--variants", help="names of variants, separated by commas")
    parser.add_argument("--note", default="", help="a sentence for the report")
    parser.add_argument("--report-only", action="store_true", help="write the report again")
    args = parser.parse_args(argv)
    try:
        plan = load_plan(args.config)
        if plan.of_records and not args.report_only:
            check_source(make_config(plan.config).data)
        if not args.teacher.is_file():
            raise FileNotFoundError(f"--teacher: {args.teacher} does not exist")
        chosen = args.variants.split(",") if args.variants else list(plan.variants)
        if unknown := set(chosen) - set(plan.variants):
            raise ConfigError(f"--variants: unknown {sorted(unknown)}")
        report = args.results.with_suffix(".json")
        report.parent.mkdir(parents=True, exist_ok=True)
        beside = (report.with_suffix(".md"), report.with_suffix(".png"))
        check_output(report, text='"variants"', beside=beside)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        begun = {"--teacher": fingerprint_files([args.teacher])}
        begun |= {f"variants.{name}": plan.fingerprint(name) for name in chosen}
        same_inputs(args.out, begun)
    except ValueError as error:
        sys.exit(f"error: {error}")
    kept = args.out / "runs.jsonl"
    results = read_lines(kept) if kept.exists() else []
    done = {(r["variant"], r["seed"]) for r in results}
    # Seed by seed, so that an interrupted run has results of every variant.
    for seed in () if args.report_only else plan.seeds:
        for name in chosen:
            if (name, seed) in done:
                continue
            print(f"-- {name}, seed {seed}", flush=True)
            result = run_one(plan, name, seed, args.teacher, args.out)
            results.append(result)
            with kept.open("a") as file:
                file.write(json.dumps(result) + "\n")
    command = f"python -m training.experiments --config {args.config} --teacher TEACHER"
    write(plan, results, args.results, command, args.note)


if __name__ == "__main__":
    main()
