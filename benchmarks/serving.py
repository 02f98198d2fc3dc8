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
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving_report import UNITS, markdown, plot
from benchmarks.serving_server import (
    VLLM,
    complete,
    counters,
    d2f_figures,
    run_command,
    serve,
    simulated,
)
from benchmarks.workers import on_gpu
from benchmarks.workload import (
    Item,
    UsageError,
    environment,
    grade,
    load_items,
    resolve_model,
    write_result,
)

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
            *(str(VLLM), "bench", "serve", "--backend", "openai", "--base-url", url),
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
        run_command(command, args.timeout)
        return json.loads((Path(folder) / "result.json").read_text())


def bench_throughput(args: argparse.Namespace, model: str, tokenizer: str) -> dict[str, Any]:
    """`vllm bench throughput` on random prompts, offline. Says that it works, has no score."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [
            *(str(VLLM), "bench", "throughput", "--model", model, "--tokenizer", tokenizer),
            *("--dataset-name", "random", "--random-input-len", "32"),
            *("--random-output-len", str(args.max_tokens), "--num-prompts", str(args.prompts)),
            *("--seed", str(args.seed), "--output-json", str(out), *engine_options(args)),
        ]
        run_command(command, args.timeout)
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
    if not (on_gpu() if args.gpu is None else args.gpu):
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
        with serve(model, engine_options(args), args.base_url, args.timeout) as url:
            answers = complete(url, model, [i.question for i in items], args.max_tokens)
            made_up = simulated(url)
            grades = [grade(i, *answer) for i, answer in zip(items, answers, strict=True)]
            points = []
            for rate in args.rates:
                before = counters(url)
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
                    | d2f_figures(before, counters(url))
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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["d2f-tiny", "ar-tiny"])
    parser.add_argument("--base-url", help="a server that runs already, with --models ITS_MODEL")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="requests/s")
    parser.add_argument("--runs", type=int, default=5, help="at each rate")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--data", help='JSONL with "question" and "answer" per line')
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument(
        "--engine-args",
        type=shlex.split,
        default=[],
        metavar="TEXT",
        help="more options of vllm serve, in one word: --engine-args='--load-format dummy'",
    )
    parser.add_argument(
        "--gpu",
        action=argparse.BooleanOptionalAction,
        help="vLLM's own dtype, memory and graphs (default: if there is a GPU)",
    )
    parser.add_argument("--timeout", type=int, default=900, help="seconds for each command")
    parser.add_argument("--no-throughput", action="store_true", help="skip vllm bench throughput")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one model, one rate, 8 problems")
    parser.add_argument("--json", help="write .json, .md and .png under this name")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.rates, args.prompts = args.models[:1], [8.0], 8
        args.runs, args.no_throughput = 1, True
    if min(args.runs, args.prompts, args.max_tokens, args.max_num_seqs) < 1 or min(args.rates) <= 0:
        parser.error(
            "--runs, --prompts, --max-tokens and --max-num-seqs must be at least 1, --rates above 0"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        if args.base_url and len(args.models) != 1:
            raise UsageError("--base-url: pass --models with the one model this server serves")
        for model in args.models:
            resolve_model("--models", model)
        items = load_items(args.prompts, args.data, args.seed)
        report: dict[str, Any] = {
            "scores": {},
            **environment(args.seed, arguments, "benchmarks.serving"),
            "prompts": args.prompts,
            "runs": args.runs,
            "max_tokens": args.max_tokens,
            "max_num_seqs": args.max_num_seqs,
            "units": UNITS,
            "models": {Path(m).name: measure_model(args, m, items) for m in args.models},
        }
        if not args.no_throughput and not args.base_url:
            name = Path(args.models[0]).name
            report["vllm_bench_throughput"] = {name: throughput(args, args.models[0])}
    except (UsageError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report["scores"] = {name: found["score"] for name, found in report["models"].items()}
    write_result(report, markdown(report), args.json)
    if args.json:
        plot(report, Path(args.json).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    # `timeout` and job managers end a program so; the server must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
