# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` under Poisson arrivals, measured by `vllm bench serve`, D2F beside AR.

    python -m benchmarks.serving --json benchmarks/results/serving.json
    python -m benchmarks.serving --base-url http://localhost:8000 --models d2f-tiny  # one that runs
    python -m benchmarks.serving --quick                                      # under a minute

Every model gets a server of its own, one after the other. The problems first go through
/v1/completions and are graded (which also warms the server up), then vLLM's own `vllm bench serve`
sends the same problems at each request rate; its answers are graded too. What D2F did is read from
the server's counters.

    python -m benchmarks.serving --streaming --at-once 1 8     # d2f-tiny, no server

times streaming: the time to the first token, and the gaps between pieces. The engine emits a
token once every token before it is decoded (`prefix`). Block-wise streaming would emit it when its
block is committed (`block`): one forward after the block is full, or with the last piece. When that
is follows from the same run, so both are timed on the same forwards and differ in nothing else.
"""

import argparse
import itertools
import json
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import figure, record, server, workload
from benchmarks.harness.engine import greedy, shut_down, start_engine
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.workload import Item, grade, load_items, resolve_model

UNITS = {
    "request_rate": "requests per second on offer, Poisson arrivals; inf: all at once",
    "requests_per_s": "requests per second completed, median of the runs",
    "spread": "lowest and highest run",
    "tokens_per_s": "output tokens per second; answers end by themselves, so all are useful",
    "first_token_ms": "milliseconds until the first tokens arrive",
    "per_token_ms": "milliseconds per further token; near 0 where an answer comes in one piece",
    "request_ms": "milliseconds until the answer is complete: the figure to compare",
    "tokens_per_forward": "counters: committed tokens / denoising forwards of a request",
    "positions_per_token": "counters: window positions computed / committed tokens",
    "exact": "fraction of answers right to the letter",
    "final": "fraction of answers that end by themselves with the right number",
}
STREAMED = "first_token_ms gap_ms gap_p95_ms pieces tokens_per_piece"
STREAMED_UNITS = {
    "first_token_ms": "milliseconds from handing in the request to its first tokens, median",
    "gap_ms": "milliseconds between pieces of an answer, median; gap_p95_ms: 95th percentile",
    "pieces": "outputs per answer",
    "tokens_per_piece": "tokens of an output, on average",
}
RATES = (2.0, 8.0, 32.0, float("inf"))
PERCENTILES = ("50", "99")
SPREAD = ("requests_per_s", "tokens_per_s")
# vllm bench serve's name -> ours
LATENCIES = {"ttft": "first_token_ms", "tpot": "per_token_ms", "e2el": "request_ms"}


def bench_serve(
    args: argparse.Namespace, url: str, model: str, tokenizer: str, data: str, rate: float, run: int
) -> dict[str, Any]:
    """Run `vllm bench serve` once, with arrivals of its own, and return the JSON it writes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(server.VLLM), "bench", "serve", "--backend", "openai", "--base-url", url),
            *("--endpoint", "/v1/completions", "--model", model, "--tokenizer", tokenizer),
            *("--dataset-name", "custom", "--dataset-path", data, "--skip-chat-template"),
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


def engine_options(args: argparse.Namespace) -> list[str]:
    """Return options for `vllm serve`; on a CPU float32 without compilation."""
    options = ["--max-num-seqs", str(args.max_num_seqs), "--no-enable-prefix-caching"]
    if not (record.on_gpu() if args.gpu is None else args.gpu):
        options += ["--dtype", "float32", "--enforce-eager"]
        options += ["--kv-cache-memory-bytes", str(1 << 28)]
    return options + args.engine_args


def measure_model(args: argparse.Namespace, model: str, items: Sequence[Item]) -> dict[str, Any]:
    """Measure one model at every rate."""
    tokenizer = resolve_model("--models", model)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        lines = (json.dumps({"prompt": item.question}) + "\n" for item in items)
        data.write_text("".join(lines), encoding="utf-8")
        with server.serve(model, engine_options(args), args.base_url, args.timeout) as url:
            answers = server.complete(url, model, [i.question for i in items], args.max_tokens)
            made_up = server.parse_simulated(server.metrics(url))
            grades = [grade(i, *answer) for i, answer in zip(items, answers, strict=True)]
            points = []
            for rate in args.rates:
                before = server.parse_counters(server.metrics(url))
                found = [
                    bench_serve(args, url, model, tokenizer, str(data), rate, run)
                    for run in range(args.runs)
                ]
                runs = [_point(one, items, args.max_tokens) for one in found]
                points.append(
                    {"request_rate": "inf" if rate == float("inf") else rate}
                    | combine(runs)
                    | server.d2f_figures(before, server.parse_counters(server.metrics(url)))
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
    """Return the reported part of vLLM's result, and the score of its answers."""
    lengths, texts = found["output_lens"], found["generated_texts"]
    grades = [
        grade(item, text, 0 < length < max_tokens)
        for item, text, length in zip(items, texts, lengths, strict=True)
    ]
    return {
        "completed": found["completed"],
        "failed": found.get("failed", len(items) - found["completed"]),
        "duration_s": round(found["duration"], 3),
        "requests_per_s": round(found["request_throughput"], 3),
        "tokens_per_s": round(found["output_throughput"], 2),
        "most_at_once": found.get("max_concurrent_requests"),
        "score": _score(grades),
        **{ours: {f"p{p}": round(found[f"p{p}_{theirs}_ms"], 2) for p in PERCENTILES}
           for theirs, ours in LATENCIES.items()},
    }  # fmt: skip


def combine(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the runs at one rate, with the range of what is compared.

    Failed and completed requests are summed over the runs.
    """

    def each(name: str, key: str | None = None) -> list[Any]:
        return [run[name] if key is None else run[name][key] for run in runs]

    def median(name: str, key: str | None = None) -> float:
        return round(statistics.median(each(name, key)), 4)

    busiest = [most for most in each("most_at_once") if most is not None]
    spread = {name: each(name) for name in SPREAD} | {"request_ms_p50": each("request_ms", "p50")}
    return {
        "runs": len(runs),
        **{name: sum(each(name)) for name in ("completed", "failed")},
        **{name: median(name) for name in ("duration_s", *SPREAD)},
        "most_at_once": max(busiest, default=None),
        **{
            name: {key: median(name, key) for key in runs[0][name]}
            for name in ("score", *LATENCIES.values())
        },
        "spread": {name: [min(values), max(values)] for name, values in spread.items()},
    }


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Return the report as a table, one line per model and rate, or per way of streaming."""
    if "at_once" in report:
        rows = (
            {"at_once": at_once, "stream": way, **figures}
            for at_once, ways in report["at_once"].items()
            for way, figures in ways.items()
        )
        head = record.head("Tokens as they are decoded against whole blocks", report)
        return [*head, *record.columns(f"at_once stream {STREAMED}", rows)]
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
    return lines


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the time to the complete answer against the offered rate."""
    if "at_once" in report:
        return
    drawing, axes = figure.new_figure(height=5.2)
    # All requests at once have no rate; their place is at the right.
    offered = {p["request_rate"] for f in report["models"].values() for p in f["points"]}
    rates = sorted(offered - {"inf"})
    place = {rate: rate for rate in rates} | {"inf": 4 * rates[-1] if rates else 1}
    ticks = {place[rate]: "all at once" if rate == "inf" else f"{rate:g}" for rate in offered}
    colors = figure.COLORS.values()
    for color, (model, found) in zip(colors, report["models"].items(), strict=False):
        where = [place[p["request_rate"]] for p in found["points"]]
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
    help = "more options of vllm serve, in one word: --engine-args='--load-format dummy'"
    add("--engine-args", type=shlex.split, default=[], metavar="TEXT", help=help)
    help = "vLLM's own dtype, memory and graphs (default: if there is a GPU)"
    add("--gpu", action=argparse.BooleanOptionalAction, help=help)
    add("--timeout", type=int, default=900, help="seconds for each command")
    add("--streaming", action="store_true", help="time streaming, without a server")
    add("--at-once", type=int, nargs="+", default=[1, 8], help="requests, with --streaming")
    positive = ("runs", "prompts", "max_tokens", "max_num_seqs", "at_once")
    args = parser.finish(argv, {"prompts": 8, "runs": 1, "at_once": [2]}, positive)
    if args.quick or args.streaming:
        args.models, args.rates = args.models[:1], [8.0]
    if min(args.rates) <= 0:
        parser.error("--rates must be above 0")
    return args


def serving(run: Record) -> None:
    """Serve and measure one model after the other, and report."""
    args = run.args
    if args.streaming:
        streaming(run)
        return
    if args.base_url and len(args.models) != 1:
        raise UsageError("--base-url: pass --models with the one model this server serves")
    for model in args.models:
        resolve_model("--models", model)
    items = load_items(args.prompts, args.data, args.seed)
    models = {
        Path(m).name: run.point(f"model {Path(m).name}", partial(measure_model, args, m, items))
        for m in args.models
    }
    run.need_all()
    report = run.report(
        scores={name: found["score"] for name, found in models.items()},
        **{n: getattr(args, n) for n in ("prompts", "runs", "max_tokens", "max_num_seqs")},
        units=UNITS,
        models=models,
    )
    run.write(report)


# Streaming.


Pieces = list[tuple[float, int]]
"""Time and tokens of each piece of an answer."""


@dataclass
class Timeline:
    """One request: when it was sent, and how many tokens were out after each of its outputs."""

    block_size: int
    sent: float
    outputs: Pieces = field(default_factory=list)

    def prefix(self) -> Pieces:
        """Return the pieces that the engine sent."""
        return _pieces(self.outputs)

    def block(self, steps: Sequence[float]) -> Pieces:
        """Return the pieces of block-wise streaming; `steps` are the ends of all forwards.

        A forward commits the blocks that were full before it; the last one ends the request.
        """
        end, everything = self.outputs[-1]
        totals, waiting, out = [], deque(self.outputs), 0
        for at in steps:
            if self.sent < at < end:
                totals.append((at, out // self.block_size * self.block_size))
                while waiting and waiting[0][0] <= at:
                    out = waiting.popleft()[1]
        return _pieces([*totals, (end, everything)])


def _pieces(totals: Pieces) -> Pieces:
    """Return time and count of new tokens, where there are any."""
    before = [(0.0, 0), *totals]
    return [
        (at, total - out)
        for (_, out), (at, total) in zip(before, totals, strict=False)
        if total > out
    ]


def summary(sent: Sequence[float], pieces: Sequence[Pieces]) -> dict[str, float]:
    """Return medians of first tokens and gaps over requests, and the sizes of the pieces."""
    first = [1e3 * (p[0][0] - start) for start, p in zip(sent, pieces, strict=True)]
    gaps = sorted(1e3 * (b[0] - a[0]) for p in pieces for a, b in itertools.pairwise(p)) or [0.0]
    tokens, number = sum(count for p in pieces for _, count in p), sum(map(len, pieces))
    return {
        "first_token_ms": round(statistics.median(first), 2),
        "gap_ms": round(statistics.median(gaps), 2),
        "gap_p95_ms": round(gaps[int(0.95 * (len(gaps) - 1))], 2),
        "pieces": round(number / len(pieces), 2),
        "tokens_per_piece": round(tokens / number, 2),
    }


def keep_running(
    llm: Any, prompts: Sequence[list[int]], params: Any, block_size: int, at_once: int
) -> tuple[list[Timeline], list[float]]:
    """Keep `at_once` requests in the engine. Return the timelines and the ends of all forwards."""
    engine, waiting = llm.llm_engine, deque(enumerate(prompts))
    lines: dict[str, Timeline] = {}
    steps: list[float] = []
    running = 0
    while waiting or running:
        while waiting and running < at_once:
            index, prompt = waiting.popleft()
            lines[str(index)] = Timeline(block_size, time.perf_counter())
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
            running += 1
        outputs = engine.step()
        steps.append(time.perf_counter())
        for output in outputs:
            lines[output.request_id].outputs.append((steps[-1], len(output.outputs[0].token_ids)))
            running -= output.finished
    return list(lines.values()), steps


def streaming(run: Record) -> None:
    """Time both ways of streaming for each number of concurrent requests."""
    args = run.args
    model, config, settings = workload.d2f_model("--models", args.models[0])
    block_size = settings.params.block_size
    max_model_len = min(config.max_position_embeddings, 1024)
    prompts = workload.load_prompts(model, args.prompts, args.data, args.seed)
    prompts = [prompt[: max_model_len - args.max_tokens] for prompt in prompts]
    # Decode past end tokens: these problems' answers are too short to measure gaps.
    params = greedy(args.max_tokens, ignore_eos=True, detokenize=False)
    room: dict[str, Any] = dict(window=settings.window, max_model_len=max_model_len)
    llm = start_engine(model, additional_config={}, **room)
    keep_running(llm, prompts[:2], params, block_size, 2)  # warm up

    def measure(at_once: int) -> dict[str, Any]:
        lines, steps = keep_running(llm, prompts, params, block_size, at_once)
        sent = [line.sent for line in lines]
        return {
            "prefix": summary(sent, [line.prefix() for line in lines]),
            "block": summary(sent, [line.block(steps) for line in lines]),
        }

    found = {n: run.point(str(n), partial(measure, n)) for n in args.at_once}
    shut_down(llm)
    run.need_all()
    report = run.report(
        units=STREAMED_UNITS, model=Path(args.models[0]).name, block_size=block_size,
        prompts=len(prompts), at_once={str(n): ways for n, ways in found.items()},
        machine=f"{record.platform.machine()}, {record.platform.system()}, CPU, float32",
    )  # fmt: skip
    run.write(report)


main = record.command(parse, serving, markdown, FIGURES)

if __name__ == "__main__":
    # `timeout` and job managers end a program with this signal; the server must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
