# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` under Poisson arrivals, measured by `vllm bench serve`, D2F beside AR.

    python -m benchmarks.serving --json benchmarks/results/serving.json
    python -m benchmarks.serving --base-url http://localhost:8000 --models d2f-tiny  # one that runs
    python -m benchmarks.serving --quick                                      # under a minute

Every model gets a server of its own, one after the other. The problems first go through
/v1/completions and are graded (which also warms the server up), then `vllm bench serve`, as it
comes with vLLM, sends the same problems at each request rate; its answers are graded too, so each
speed has the score of the very answers it was measured on. What D2F did is read from the server's
counters. `vllm bench throughput` is run once on the first model, offline.
"""

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import figure, record, server
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.workload import Item, grade, load_items, resolve_model

UNITS = {
    "request_rate": "requests per second on offer, Poisson arrivals; inf: all at once",
    "requests_per_s": "requests per second completed, median of the runs",
    "spread": "lowest and highest run",
    "tokens_per_s": "output tokens per second; answers end by themselves, so all are useful",
    "first_token_ms": "milliseconds until the first tokens arrive",
    "per_token_ms": "milliseconds per further token, per request; near 0 where a whole answer "
    "arrives in one piece",
    "request_ms": "milliseconds until the answer is complete: the figure to compare",
    "tokens_per_forward": "counters: committed tokens / denoising forwards of a request",
    "positions_per_token": "counters: window positions computed / committed tokens",
    "exact": "fraction of answers right to the letter",
    "final": "fraction of answers that end by themselves with the right number",
}
RATES = (2.0, 8.0, 32.0, float("inf"))
PERCENTILES = ("50", "99")
SPREAD = ("requests_per_s", "tokens_per_s")
# vllm bench serve's name -> ours
LATENCIES = {"ttft": "first_token_ms", "tpot": "per_token_ms", "e2el": "request_ms"}


def bench_serve(
    args: argparse.Namespace,
    url: str,
    model: str,
    tokenizer: str,
    data: Path,
    rate: float,
    run: int = 0,
) -> dict[str, Any]:
    """One run of `vllm bench serve`: the JSON that it writes. Each run has arrivals of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(server.VLLM), "bench", "serve", "--backend", "openai", "--base-url", url),
            *("--endpoint", "/v1/completions", "--model", model, "--tokenizer", tokenizer),
            *("--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template"),
            *("--custom-output-len", str(args.max_tokens), "--disable-shuffle"),
            *("--num-prompts", str(args.prompts), "--request-rate", str(rate), "--burstiness", "1"),
            *("--seed", str(args.seed + run), "--temperature", "0", "--disable-tqdm"),
            *("--percentile-metrics", ",".join(LATENCIES)),
            *("--metric-percentiles", ",".join(PERCENTILES)),
            *("--save-result", "--save-detailed"),
            *("--result-dir", folder, "--result-filename", "result.json"),
        ]
        server.run_command(command, args.timeout)
        return json.loads((Path(folder) / "result.json").read_text())


def bench_throughput(args: argparse.Namespace, model: str, tokenizer: str) -> dict[str, Any]:
    """`vllm bench throughput` on random prompts, offline. Says that it works, has no score."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [
            *(str(server.VLLM), "bench", "throughput", "--model", model, "--tokenizer", tokenizer),
            *("--dataset-name", "random", "--random-input-len", "32"),
            *("--random-output-len", str(args.max_tokens), "--num-prompts", str(args.prompts)),
            *("--seed", str(args.seed), "--output-json", str(out), *engine_options(args)),
        ]
        server.run_command(command, args.timeout)
        found = json.loads(out.read_text())
    names = ("elapsed_time", "num_requests", "requests_per_second", "tokens_per_second")
    return {
        "command": "vllm bench throughput --dataset-name random --random-input-len 32 "
        f"--random-output-len {args.max_tokens} --num-prompts {args.prompts}",
        "note": "random prompts, end tokens ignored: no score, and prompt tokens are counted in",
        **{name: found[name] for name in names},
    }


def throughput(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """`bench_throughput`; a failure is a finding too, and must not lose what was measured."""
    try:
        return bench_throughput(args, model, resolve_model("--models", model))
    except subprocess.SubprocessError as error:
        print(f"error: {error}", file=sys.stderr)
        return {"failed": str(error)[-300:]}


def engine_options(args: argparse.Namespace) -> list[str]:
    """For `vllm serve` and `vllm bench throughput` alike; on a CPU float32 without compilation."""
    options = ["--max-num-seqs", str(args.max_num_seqs), "--no-enable-prefix-caching"]
    if not (record.on_gpu() if args.gpu is None else args.gpu):
        options += ["--dtype", "float32", "--enforce-eager"]
        options += ["--kv-cache-memory-bytes", str(1 << 28)]
    return options + args.engine_args


def measure_model(args: argparse.Namespace, model: str, items: Sequence[Item]) -> dict[str, Any]:
    """One model at every rate."""
    tokenizer = resolve_model("--models", model)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        lines = (json.dumps({"prompt": item.question}) + "\n" for item in items)
        data.write_text("".join(lines), encoding="utf-8")
        with server.serve(model, engine_options(args), args.base_url, args.timeout) as url:
            answers = server.complete(url, model, [i.question for i in items], args.max_tokens)
            made_up = server.simulated(url)
            grades = [grade(i, *answer) for i, answer in zip(items, answers, strict=True)]
            points = []
            for rate in args.rates:
                before = server.counters(url)
                runs = [
                    _point(
                        bench_serve(args, url, model, tokenizer, data, rate, run),
                        items,
                        args.max_tokens,
                    )
                    for run in range(args.runs)
                ]
                points.append(
                    {"request_rate": "inf" if rate == float("inf") else rate}
                    | combine(runs)
                    | server.d2f_figures(before, server.counters(url))
                )
                print(f"{Path(model).name}: {points[-1]}", file=sys.stderr)
    return {
        "score": _score(grades),
        "score_from": "/v1/completions, the same problems, before the runs",
        "simulated_tokens_per_forward": made_up,
        "points": points,
    }


def _score(grades: Sequence[Any]) -> dict[str, float]:
    return {
        name: round(sum(getattr(g, name) for g in grades) / len(grades), 4)
        for name in ("exact", "final")
    }


def _point(found: dict[str, Any], items: Sequence[Item], max_tokens: int) -> dict[str, Any]:
    """What we report of vLLM's result, and the score of its answers."""
    lengths, texts = found["output_lens"], found["generated_texts"]
    grades = [
        grade(item, text, 0 < length < max_tokens)
        for item, text, length in zip(items, texts, lengths, strict=True)
    ]
    point: dict[str, Any] = {
        "completed": found["completed"],
        "failed": found.get("failed", len(items) - found["completed"]),
        "duration_s": round(found["duration"], 3),
        "requests_per_s": round(found["request_throughput"], 3),
        "tokens_per_s": round(found["output_throughput"], 2),
        "most_at_once": found.get("max_concurrent_requests"),
        "score": _score(grades),
    }
    for theirs, ours in LATENCIES.items():
        point[ours] = {f"p{p}": round(found[f"p{p}_{theirs}_ms"], 2) for p in PERCENTILES}
    return point


def combine(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs at one rate, and lowest and highest of what is compared.

    What failed in any run counts: it is summed, as is what was completed.
    """
    point: dict[str, Any] = {"runs": len(runs)}
    for name in ("completed", "failed"):
        point[name] = sum(run[name] for run in runs)
    for name in ("duration_s", *SPREAD):
        point[name] = statistics.median(run[name] for run in runs)
    busiest = [run["most_at_once"] for run in runs if run["most_at_once"] is not None]
    point["most_at_once"] = max(busiest, default=None)
    for name in ("score", *LATENCIES.values()):
        point[name] = {
            key: round(statistics.median(run[name][key] for run in runs), 4)
            for key in runs[0][name]
        }
    low_high = {name: [f(run[name] for run in runs) for f in (min, max)] for name in SPREAD}
    low_high["request_ms_p50"] = [f(run["request_ms"]["p50"] for run in runs) for f in (min, max)]
    point["spread"] = low_high
    return point


def markdown(report: Mapping[str, Any]) -> list[str]:
    """The report as a table, one line per model and rate."""

    models = report["models"]
    points = [
        {"model": name, "tokens_per_forward": "1 (AR)", "spread": {}, **point}
        for name, found in models.items()
        for point in found["points"]
    ]
    columns = "model request_rate requests_per_s spread.requests_per_s tokens_per_s "
    columns += "spread.tokens_per_s request_ms first_token_ms tokens_per_forward failed"
    lines = [
        *record.head("Serving under Poisson arrivals", report, *models.values()),
        f"{report['prompts']} problems per run, median of {report.get('runs', 1)} run(s); at most",
        f"{report['max_tokens']} tokens, greedy, at most {report['max_num_seqs']} at once.",
        "Client and server share the machine. Times are p50 / p99, spreads lowest to highest run.",
        "",
        *record.columns(f"{columns} score.exact score.final", points),
    ]
    for model, found in models.items():
        exact, final = (100 * found["score"][k] for k in ("exact", "final"))
        lines.append(
            f"- {model}, the same problems by /v1/completions: exact {exact:.1f} %, "
            f"final {final:.1f} %"
        )
    for model, found in report.get("vllm_bench_throughput", {}).items():
        if "failed" in found:
            lines.append(f"- `vllm bench throughput` on {model} **failed**")
            continue
        lines.append(
            f"- `vllm bench throughput` on {model}, offline, {found['num_requests']} random "
            f"prompts: {found['requests_per_second']:.2f} requests/s, "
            f"{found['tokens_per_second']:.0f} tokens/s ({found['note']})"
        )
    return lines


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Time to the complete answer against the rate on offer."""
    drawing, axes = figure.new_figure(height=5.2)
    # Everything at once has no rate: a place of its own at the right.
    offered = [p["request_rate"] for f in report["models"].values() for p in f["points"]]
    rates = sorted({rate for rate in offered if rate != "inf"})
    ticks = {**{rate: f"{rate:g}" for rate in rates}}
    at_once = 4 * rates[-1] if rates else 1
    if "inf" in offered:
        ticks[at_once] = "all at once"
    for color, (model, found) in zip(
        figure.COLORS.values(), report["models"].items(), strict=False
    ):
        where = [at_once if p["request_rate"] == "inf" else p["request_rate"]
                 for p in found["points"]]  # fmt: skip
        exact = 100 * found["score"]["exact"]
        for name, style in (("p50", "o-"), ("p99", "o:")):
            times = [p["request_ms"][name] for p in found["points"]]
            label = f"{model} {name}, {exact:.1f} % right"
            axes.plot(where, times, style, color=color, label=label)
        figure.label_simulated(axes, found)
    labels = ("requests per second on offer", "milliseconds to the complete answer")
    figure.logarithmic(axes, *labels, base=10, few_decades=True)
    axes.set_xticks(list(ticks), list(ticks.values()))
    figure.legend_below(axes)
    figure.save(drawing, path)


FIGURES = {"": draw}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("serving", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["d2f-tiny", "ar-tiny"])
    add("--base-url", help="a server that runs already, with --models ITS_MODEL")
    add("--rates", type=float, nargs="+", default=list(RATES), help="requests/s")
    add("--runs", type=int, default=5, help="at each rate")
    add("--prompts", type=int, default=100)
    add("--data", help='JSONL with "question" and "answer" per line')
    add("--max-tokens", type=int, default=64)
    add("--max-num-seqs", type=int, default=32)
    add(
        "--engine-args",
        type=shlex.split,
        default=[],
        metavar="TEXT",
        help="more options of vllm serve, in one word: --engine-args='--load-format dummy'",
    )
    add(
        "--gpu",
        action=argparse.BooleanOptionalAction,
        help="vLLM's own dtype, memory and graphs (default: if there is a GPU)",
    )
    add("--timeout", type=int, default=900, help="seconds for each command")
    add("--no-throughput", action="store_true", help="skip vllm bench throughput")
    args = parser.finish(argv, {}, ("runs", "prompts", "max_tokens", "max_num_seqs"))
    if args.quick:
        args.models, args.rates, args.prompts = args.models[:1], [8.0], 8
        args.runs, args.no_throughput = 1, True
    if min(args.rates) <= 0:
        parser.error("--rates must be above 0")
    return args


def serving(run: Record) -> None:
    """Serve and measure one model after the other, and report."""
    args = run.args
    if args.base_url and len(args.models) != 1:
        raise UsageError("--base-url: pass --models with the one model this server serves")
    for model in args.models:
        resolve_model("--models", model)
    items = load_items(args.prompts, args.data, args.seed)
    models = {
        Path(m).name: run.point(f"model {Path(m).name}", partial(measure_model, args, m, items))
        for m in args.models
    }
    first = args.models[0]
    parts: dict[str, Any] = {}
    if not args.no_throughput and not args.base_url:
        found = run.point("vllm bench throughput", partial(throughput, args, first))
        parts["vllm_bench_throughput"] = {Path(first).name: found}
    run.need_all()
    report = run.report(
        scores={name: found["score"] for name, found in models.items()},
        **{n: getattr(args, n) for n in ("prompts", "runs", "max_tokens", "max_num_seqs")},
        units=UNITS,
        models=models,
        **parts,
    )
    run.write(report)


def main(argv: Sequence[str] | None = None) -> int:
    return record.main(serving, parse(argv), markdown, FIGURES)


if __name__ == "__main__":
    # `timeout` and job managers end a program so; the server must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
