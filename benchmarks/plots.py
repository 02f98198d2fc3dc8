# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was measured, PNG, readable 800 pixels wide.

    python -m benchmarks.plots     # from benchmarks/results/*.json, plus the pipeline timeline

Draws what it finds: throughput.json, latency_model.json, sweep.json. The timeline is decoded here,
with the reference loop.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.workload import UsageError, load_items, resolve_model

if TYPE_CHECKING:
    from vllm_d2f.reference import Frame

RESULTS = Path(__file__).parent / "results"
COLORS = {"d2f": "#1b6ca8", "ar": "#d1495b", "vanilla": "#7a7a7a"}
NAMES = {"d2f": "D2F", "ar": "autoregressive", "vanilla": "vanilla diffusion"}
STATES = (
    ("mask", "#eceff1"),
    ("decided in this forward", "#f4a259"),
    ("decided", "#8cb9d9"),
    ("committed: final, in the cache", "#1b6ca8"),
)


def new_figure(height: float = 4.2, columns: int = 1) -> tuple[Any, Any]:
    """A figure 1600 pixels wide: sharp at 800 on a display with double resolution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(
        1, columns, figsize=(8, height), dpi=200, sharey=True, layout="constrained"
    )
    for one in figure.axes:
        one.set_axisbelow(True)
    return figure, axes


def plain_ticks(axes: Any, within_decades: bool = False) -> None:
    """1, 10, 100 and not powers; `within_decades`: 2 and 5 too, for a range of few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if within_decades:
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def legend_below(axes: Any) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
    axes.legend(fontsize=10, frameon=False, **place)


def label_simulated(axes: Any, report: Mapping[str, Any]) -> None:
    """Nobody must take made-up acceptance for a model's."""
    if (made_up := report.get("simulated_tokens_per_forward")) is not None:
        text = f"SIMULATED ACCEPTANCE: {made_up:g} tokens per forward, no score"
        axes.set_title(text, color="#d1495b", fontsize=11)


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version in the file, so that the same figure is the same file.
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def throughput(report: Mapping[str, Any], path: Path) -> None:
    """Useful tokens per second against batch size, lowest to highest run shaded."""
    figure, axes = new_figure(height=5.2)
    points = report["points"]
    styles = {"eager": "-", "compiled": "--"}
    series = sorted(
        {(p["kind"], p["mode"]) for p in points if p["kind"] != "vanilla"}, reverse=True
    )
    for kind, mode in series:
        rows = [p for p in points if (p["kind"], p["mode"]) == (kind, mode)]
        sizes = [p["batch_size"] for p in rows]
        speed = {k: [p["useful_tokens_per_s"][k] for p in rows] for k in ("median", "min", "max")}
        score = f"{report[f'score_{kind}']:.1%} right"
        label = f"{NAMES[kind]}, {mode}, {score}"
        style = styles.get(mode, ":")
        axes.plot(sizes, speed["median"], style, marker="o", color=COLORS[kind], label=label)
        axes.fill_between(sizes, speed["min"], speed["max"], color=COLORS[kind], alpha=0.15, lw=0)
    markers = iter("sD^vPX*")
    for p in (p for p in points if p["kind"] == "vanilla"):
        axes.plot(
            p["batch_size"],
            p["useful_tokens_per_s"]["median"],
            next(markers, "."),
            color=COLORS["vanilla"],
            # Hollow: wrong answers, so what it is fast at is no use.
            mfc=COLORS["vanilla"] if p["score"] >= 0.5 else "none",
            ls="none",
            label=f"vanilla {p['mode']}, {p['score']:.0%} right",
        )
    ticks = sorted({p["batch_size"] for p in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks)
    plain_ticks(axes)
    axes.set(xlabel="batch size", ylabel="useful tokens per second")
    axes.grid(alpha=0.3)
    legend_below(axes)
    label_simulated(axes, report)
    save(figure, path)


def forward_cost(report: Mapping[str, Any], path: Path) -> None:
    """Step time against tokens in the step: measured ones as dots, the fitted formula as a line.

    Steps that take in prompts are drawn as crosses; handing in a request is part of their time.
    """
    from benchmarks.costs import Cost

    figure, axes = new_figure()
    for kind, decoder in report["decoders"].items():
        cost, color = Cost.from_dict(decoder["cost"]), COLORS[kind]
        steps = decoder["steps"]
        for style, rows in (
            (".", [row for row in steps if not row["new"]]),
            ("x", [row for row in steps if row["new"]]),
        ):
            axes.plot(
                [row["tokens"] for row in rows],
                [row["ms"] for row in rows],
                style,
                color=color,
                alpha=0.3,
                ms=6,
            )
        plain = sorted((row for row in steps if not row["new"]), key=lambda row: row["tokens"])
        context = statistics.median(row["context"] / row["requests"] for row in plain)
        per_request = statistics.median(row["tokens"] / row["requests"] for row in plain)
        counts = [row["tokens"] for row in plain]
        axes.plot(
            counts,
            [cost.ms(tokens, context * tokens / per_request) for tokens in counts],
            color=color,
            lw=2,
            label=f"{NAMES[kind]}: {cost.a_ms:.1f} ms + {1e3 * cost.b_ms_per_token:.0f} µs a token",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    plain_ticks(axes)
    axes.set(xlabel="tokens in the step (x: with prompts)", ylabel="milliseconds per step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    label_simulated(axes, report)
    save(figure, path)


def prediction(report: Mapping[str, Any], path: Path) -> None:
    """Predicted tokens per second by batch size, the measured ones as points."""
    figure, axes = new_figure(height=5.2)
    for kind, model in report["decoders"].items():
        rows = model["predicted"]
        axes.plot(
            [row["batch_size"] for row in rows],
            [row["tokens_per_s"] for row in rows],
            color=COLORS[kind],
            label=f"{NAMES[kind]}, steady load predicted",
        )
        if checks := model.get("checks"):
            axes.plot(
                [row["batch_size"] for row in checks],
                [row["measured"] for row in checks],
                "o",
                color=COLORS[kind],
                label=f"{NAMES[kind]}, batch measured",
            )
            axes.plot(
                [row["batch_size"] for row in checks],
                [row["predicted"] for row in checks],
                "x",
                color=COLORS[kind],
                label=f"{NAMES[kind]}, that batch predicted",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_ticks(axes, within_decades=True)
    axes.set(xlabel="requests at once", ylabel="useful tokens per second")
    axes.grid(alpha=0.3)
    legend_below(axes)
    label_simulated(axes, report)
    save(figure, path)


def timeline(frames: "Sequence[Frame]", path: Path, title: str) -> None:
    """The pipeline: answer positions over forwards, blocks ruled, one colour per state."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    size = frames[0].block_size
    width = -(-max(len(f.tokens) for f in frames) // size) * size
    grid = [[float("nan")] * len(frames) for _ in range(width)]
    committed = 0
    for column, frame in enumerate(frames):
        # The last frame hands everything out at once; that makes nothing in it final in the cache.
        committed = committed if frame.done else frame.committed
        for position, decided in enumerate(frame.decided):
            state = 3 if position < committed else 2 if decided else 0
            if position in frame.accepted:
                state = 1
            grid[position][column] = state
    figure, axes = new_figure(height=5)
    colors = ListedColormap([color for _, color in STATES])
    axes.imshow(grid, cmap=colors, vmin=0, vmax=3, aspect="auto", interpolation="none")
    for row in range(0, width + 1, size):
        axes.axhline(row - 0.5, color="#263238", lw=1.2)
    for column in range(len(frames) + 1):
        axes.axvline(column - 0.5, color="white", lw=0.8)
    axes.set_xticks(range(len(frames)), [str(f.forward) for f in frames])
    starts = range(0, width, size)
    axes.set_yticks(
        [s + (size - 1) / 2 for s in starts], [f"block {i + 1}" for i in range(len(starts))]
    )
    axes.set(xlabel="forward", title=title)
    axes.tick_params(length=0)
    axes.legend(
        handles=[Patch(color=color, label=name) for name, color in STATES],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    save(figure, path)


def decode_frames(model: str, question: str, *, block_size: int, tau_conf: float) -> "list[Frame]":
    """One problem through the reference loop."""
    from transformers import AutoTokenizer

    from benchmarks.parity import load_forward
    from vllm_d2f.d2f import D2FParams
    from vllm_d2f.reference import decode

    forward, config = load_forward(model)
    return list(
        decode(
            forward,
            AutoTokenizer.from_pretrained(model)(question).input_ids,
            D2FParams(block_size, 8, tau_add=0.1, tau_act=0.95, tau_conf=tau_conf),
            max_tokens=64,
            mask_id=config.mask_token_id,
            ends=config.end_token_ids,
            shift=config.logits_shift,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: the same)")
    parser.add_argument("--d2f", default="d2f-tiny", help='model of the timeline, "" for none')
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--tau-conf", type=float, default=0.9999)
    parser.add_argument("--seed", type=int, default=2, help="of the timeline's problem")
    args = parser.parse_args(argv)
    out = args.out or args.results
    try:
        if not args.results.is_dir():
            raise UsageError(f"--results {args.results}: no such folder; pass where the JSON is")
        for name, draw in (("throughput", throughput), ("latency_model", prediction)):
            if (found := args.results / f"{name}.json").is_file():
                report = json.loads(found.read_text(encoding="utf-8"))
                draw(report, out / f"{name}.png")
                if name == "latency_model":
                    forward_cost(report, out / "latency_model_forward_cost.png")
        if (found := args.results / "sweep.json").is_file():
            from benchmarks.sweep_report import plot

            plot(json.loads(found.read_text(encoding="utf-8")), out / "sweep.png")
        if args.d2f:
            model = resolve_model("--d2f", args.d2f)
            # The last of five has six steps: the longest answer.
            question = load_items(5, None, args.seed)[-1].question
            frames = decode_frames(
                model, question, block_size=args.block_size, tau_conf=args.tau_conf
            )
            title = f"{frames[-1].forward} forwards for {len(frames[-1].tokens)} tokens"
            timeline(frames, out / "throughput_timeline.png", title)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
