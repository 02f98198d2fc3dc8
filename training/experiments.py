# SPDX-License-Identifier: Apache-2.0
"""What each choice of the method does, on the tiny model: `python -m training.experiments`.

Every variant distils the same teacher, for several seeds, and is decoded with the reference loop at
several thresholds. Each result is kept at once; running the command again continues.

    python -m training.experiments --config training/configs/experiments.yaml \\
        --teacher build/tiny/teacher/final.safetensors --out build/experiments \\
        --results benchmarks/results/training_experiments
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from accelerate import Accelerator

from training.arithmetic import problems
from training.attention import chosen_attention
from training.config import Config, ConfigError, make_config, merged
from training.data import encode_problems
from training.evaluate import d2f
from training.report import machine, read_lines, read_log, versions
from training.train import fit, set_up
from training.trainer import fingerprint_files, same_inputs
from vllm_d2f.output import check_output


@dataclass(frozen=True)
class Plan:
    """The experiments of a YAML file: `config` (a run with the stage `student`), `variants` with
    their changes of that stage, `groups` of variants that belong together, and how to decode."""

    config: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    thresholds: tuple[float, ...]
    problems: int
    title: str = "What the choices of D2F training do, on the tiny model"

    def of(self, name: str, seed: int) -> Config:
        changes = {"stages": {"student": {**self.variants[name], "seed": seed}}}
        return make_config(merged(self.config, changes), f"variant {name}")

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

    def fingerprint(self, name: str) -> str:
        """Return the sha256 of the settings that decide a variant's results."""
        decoded = (self.thresholds, self.problems, self.block_sizes(name))
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
        )
    except KeyError as error:
        raise ConfigError(f"{path}: {error} is missing") from None
    for title, group in plan.groups.items():
        if unknown := set(group["variants"]) - set(plan.variants):
            raise ConfigError(f"{path}: groups.{title}: unknown variants {sorted(unknown)}")
    for name in plan.variants:
        plan.of(name, 0)  # find a bad value before hours of training
    return plan


def run_one(plan: Plan, name: str, seed: int, teacher: Path, out: Path) -> dict[str, Any]:
    """Train and decode one student."""
    config = plan.of(name, seed)
    # The student starts from, and learns from, the same teacher every time.
    start = out / "teacher" / "final.safetensors"
    start.parent.mkdir(parents=True, exist_ok=True)
    if not start.exists():
        shutil.copy(teacher, start.with_suffix(".part"))
        start.with_suffix(".part").rename(start)
    accelerator = Accelerator()
    attention = chosen_attention(config.model.attention, accelerator.device)
    folder = out / f"{name}-{seed}.part"
    check_output(folder, "teacher/final.safetensors", text="")
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted one begins again, for some minutes
    student = config.stages["student"]
    # `set_up` looks for both stages side by side.
    folder.mkdir(parents=True)
    (folder / "teacher").symlink_to(start.parent.resolve())
    run = set_up(config, "student", folder, accelerator, attention)
    began = time.monotonic()
    fit(run)
    trained = time.monotonic() - began
    run.predictor.eval()
    loaded = run.loaded
    items = problems("test", plan.problems, "experiments", config.data.step_counts)
    examples = encode_problems(items, loaded.tokenizer)
    scores = []
    for block in plan.block_sizes(name):
        for tau in plan.thresholds:
            decoding = config.decoding.model_copy(update={"block_size": block, "tau_conf": tau})
            figures = d2f(
                run.predictor, examples, loaded.tokenizer, run.ends, loaded.mask_id, decoding,
                run.prompt_block, run.stage.loss.block_origin,
            )  # fmt: skip
            scores.append({"block_size": block, "tau_conf": tau, **figures.as_dict()})
    log = read_log(run.directory)
    shutil.rmtree(folder)
    accelerator.free_memory()
    return {
        "variant": name,
        "seed": seed,
        "trained_block_size": student.loss.block_size,
        "loss_content": log[-1]["loss_content"],
        "train_seconds": round(trained, 1),
        "scores": scores,
    }


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
                rows.append(
                    {
                        "variant": name,
                        "decode_block": block,
                        "tau_conf": tau,
                        "seeds": len(at),
                        "exact": spread([100 * s["exact"] for s in at]),
                        "tokens_per_forward": spread([s["tokens_per_forward"] for s in at]),
                    }
                )
    return rows


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
    path.with_suffix(".md").write_text(markdown(plan, rows, report))
    plot(plan, rows, path.with_suffix(".png"))


def markdown(plan: Plan, rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """Return a table per group, under the group's description."""
    made = ", ".join(f"{n} {v}" for n, v in report["versions"].items())
    lines = [
        f"# {plan.title}\n",
        f"`{report['command']}`, {report['machine']}, {report['date']}, {made}.\n",
        (
            f"{plan.problems} held-out problems, seeds {', '.join(map(str, plan.seeds))}; mean "
            "and standard deviation over the seeds. Exact match is the whole answer with its end "
            "token, in per cent; tpf is tokens per forward up to the end token."
            + (f" {report['note']}" if report["note"] else "")
            + "\n"
        ),
        f"![score against speed]({report['plot']})\n",
    ]
    for title, group in plan.groups.items():
        lines += [f"## {title}\n", group.get("text", "").strip() + "\n"]
        head = [f"tau_conf {tau}: exact, tpf" for tau in plan.thresholds]
        lines.append(f"| variant | decoded with block | {' | '.join(head)} |")
        lines.append("|---|---|" + "---|" * len(head))
        for name in group["variants"]:
            for block in plan.shown_blocks(group, name):
                cells = []
                for tau in plan.thresholds:
                    row = next(
                        (r for r in rows if (r["variant"], r["decode_block"], r["tau_conf"])
                         == (name, block, tau)), None
                    )  # fmt: skip
                    cells.append("" if row is None else _cell(row))
                lines.append(f"| {name} | {block} | {' | '.join(cells)} |")
        if result := group.get("result"):
            lines += ["", result.strip()]
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    exact, tpf = row["exact"], row["tokens_per_forward"]
    return f"{exact['mean']:.1f} ± {exact['sd']:.1f}, {tpf['mean']:.2f} ± {tpf['sd']:.2f}"


def plot(plan: Plan, rows: list[dict[str, Any]], path: Path) -> None:
    """Score against tokens per forward, a panel per group, a line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    lines = -(-len(plan.groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(11, 2.9 * lines), squeeze=False)
    for at, (title, group) in enumerate(plan.groups.items()):
        axis = axes[at // columns, at % columns]
        for name in group["variants"]:
            for block in plan.shown_blocks(group, name):
                line = [r for r in rows if (r["variant"], r["decode_block"]) == (name, block)]
                axis.errorbar(
                    [r["tokens_per_forward"]["mean"] for r in line],
                    [r["exact"]["mean"] for r in line],
                    xerr=[r["tokens_per_forward"]["sd"] for r in line],
                    yerr=[r["exact"]["sd"] for r in line],
                    fmt="o-",
                    ms=3,
                    lw=1,
                    label=f"{name} @{block}" if "decode" in group else name,
                )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens per forward", fontsize=8)
        axis.set_ylabel("exact match, %", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6, frameon=False)
    for at in range(len(plan.groups), lines * columns):
        axes[at // columns, at % columns].axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("training/configs/experiments.yaml"))
    parser.add_argument(
        "--teacher", type=Path, required=True, help="final.safetensors of a teacher"
    )
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--results", type=Path, required=True, help="report, without suffix")
    parser.add_argument("--variants", help="some of them, by commas")
    parser.add_argument("--note", default="", help="a sentence for the report, on the teacher say")
    parser.add_argument("--report-only", action="store_true", help="write the report again")
    args = parser.parse_args(argv)
    try:
        plan = load_plan(args.config)
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
