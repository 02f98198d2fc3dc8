# SPDX-License-Identifier: Apache-2.0
"""The collected JSON as one document: every figure with its floor and ratio, bars met or missed.

    python -m benchmarks.gpu.report gpu-results --out benchmarks/results/h200.md

What was not measured stands there as not measured. Results of a rehearsal or of `--quick` say so.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import fit, shapes
from benchmarks.gpu.stage import STAGES, STEPS
from benchmarks.gpu.store import Mismatch, read

Results = Mapping[str, dict[str, Any]]
"""The file of each stage, by name."""


class Bars:
    """What must hold, and whether it does."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def at_most(self, what: str, value: float | None, limit: float, unit: str = "") -> None:
        self._add(what, value, limit, unit, "at most", value is not None and value <= limit)

    def at_least(self, what: str, value: float | None, limit: float, unit: str = "") -> None:
        self._add(what, value, limit, unit, "at least", value is not None and value >= limit)

    def holds(self, what: str, met: bool | None) -> None:
        self.rows.append((what, "", "not measured" if met is None else "met" if met else "missed"))

    def _add(
        self, what: str, value: float | None, limit: float, unit: str, word: str, met: bool
    ) -> None:
        verdict = "not measured" if value is None else "met" if met else "missed"
        shown = "" if value is None else f"{value:.3g}{unit}"
        self.rows.append((f"{what}: {word} {limit:g}{unit}", shown, verdict))


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages' files of a folder.

    Raises:
        Mismatch: none is there, or they come from different devices.
    """
    found = {}
    for stage in STAGES:
        if (path := folder / f"{stage.name}.json").exists():
            found[stage.name] = read(path)
    if not found:
        raise Mismatch(f"no stage's file in {folder}; run benchmarks/gpu/run.sh first")
    devices = {data["about"]["device"] for data in found.values()}
    if len(devices) > 1:
        raise Mismatch(f"results of different devices: {', '.join(sorted(devices))}")
    return found


def _points(results: Results, stage: str) -> dict[str, Any]:
    return results.get(stage, {}).get("points", {})


def _rates(results: Results) -> dict[str, float] | None:
    """Copy bandwidth and matrix speed measured on the device."""
    return _points(results, "kernels").get("host/machine")


def document(results: Results, command: str) -> str:
    """The whole Markdown text."""
    bars = Bars()
    body = [
        *_attention(results, bars),
        *_steps(results, bars),
        *_speed(results, bars),
        *_parity(results, bars),
        *_kernels(results),
        *_profile(results),
        *_training(results),
    ]
    return (
        "\n".join([*_head(results, command), *_verdicts(bars), *body, *_left_out(results)]) + "\n"
    )


def _head(results: Results, command: str) -> Iterator[str]:
    about = next(iter(results.values()))["about"]
    yield f"# Measured on {about['device']}"
    yield ""
    if about["rehearse"]:
        yield "**A rehearsal on a CPU with tiny shapes: no figure here means anything.**"
        yield ""
    if about["quick"]:
        yield "**Measured with `--quick`: few points.**"
        yield ""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    yield f"`bash benchmarks/gpu/run.sh`, then `{command}`. {versions}; CUDA {about['cuda']}."
    if rates := _rates(results):
        yield (
            f"Measured on the same device: copy {rates['copy_gb_per_s']:.0f} GB/s, matrix product "
            f"{rates['matmul_gflop_per_s'] / 1e3:.0f} TFLOP/s. Floors below are made of these two."
        )
    yield ""


def _verdicts(bars: Bars) -> Iterator[str]:
    yield from ("## Bars", "", "| bar | measured | |", "|---|---|---|")
    for what, value, verdict in bars.rows:
        yield f"| {what} | {value} | {verdict} |"
    yield ""


def _attention(results: Results, bars: Bars) -> Iterator[str]:
    """Best variant against the floor; what each variant wins."""
    cases: dict[tuple[str, ...], Any] = {}
    for key, point in _points(results, "attention").items():
        layer, *case = key.split("/")
        if "variants" in point:
            cases[layer, *case] = point
    for requests in ("1", "16"):
        ratios = [
            best[1]["times_floor"]
            for (_, _, count, _), point in cases.items()
            if count == requests and (best := _best(point))
        ]
        worst = max(ratios, default=None)
        bars.at_most(f"attention / floor, {requests} request(s), worst case", worst, 1.5, "x")
    if not cases:
        return
    yield from ("## Attention of one layer", "")
    yield "`virtual` is what the engine runs. A variant moves into the engine only if it is fastest"
    yield "by 5 % or more in cases that matter: 1 to 16 requests, blocks of 32."
    yield from (
        "",
        "| variant | cases | time / floor, median | fastest in | of those that matter |",
    )
    yield "|---|---|---|---|---|"
    names = dict.fromkeys(name for point in cases.values() for name in point["variants"])
    for name in names:
        have = [p["variants"][name] for p in cases.values() if "ms" in p["variants"].get(name, {})]
        if have:
            wins = [k for k, p in cases.items() if (best := _best(p)) and best[0] == name]
            matter = [key for key in wins if _matters(key) and _lead(cases[key], name) >= 1.05]
            median = statistics.median(v["times_floor"] for v in have)
            yield f"| {name} | {len(have)} | {median:.2f} | {len(wins)} | {len(matter)} |"
    yield ""
    why = {
        f"- `{name}`: {found.get('unavailable') or found.get('failed') or found.get('wrong_by')}"
        for point in cases.values()
        for name, found in point["variants"].items()
        if "ms" not in found and "GiB of scores" not in str(found.get("unavailable"))
    }
    yield from (*sorted(why), "")
    yield "| layer | context | reqs | blocks | floor ms (bound) | best | ms | x floor | `virtual` |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (layer, context, requests, blocks), point in cases.items():
        if best := _best(point):
            virtual = point["variants"].get("virtual", {}).get("times_floor")
            yield (
                f"| {layer} | {context} | {requests} | {blocks} | {point['floor_ms']:.4f} "
                f"({point['bound']}) | {best[0]} | {best[1]['ms']:.4f} | "
                f"{best[1]['times_floor']:.2f} | {'' if virtual is None else f'{virtual:.2f}'} |"
            )
    yield ""


def _best(point: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The fastest variant that reads pages, as a server must."""
    have = {
        name: found
        for name, found in point["variants"].items()
        if "ms" in found and name not in ("sdpa", "flex")
    }
    return min(have.items(), key=lambda item: item[1]["ms"]) if have else None


def _matters(key: tuple[str, ...]) -> bool:
    return int(key[2]) <= 16 and key[3].endswith("x32")


def _lead(point: Mapping[str, Any], name: str) -> float:
    """How much faster than `virtual`; 0 without it."""
    virtual = point["variants"].get("virtual", {}).get("ms", 0.0)
    return virtual / point["variants"][name]["ms"]


def step_floor_ms(part: str, point: Mapping[str, Any], rates: Mapping[str, float]) -> float:
    """Reading weights and the cache once, or the products of the step, whichever takes longer."""
    shape = part.partition("-")[0]
    weights = shapes.weight_bytes(shape)["step"]
    bytes_ = weights + shapes.kv_bytes_per_token(shape) * point["context_tokens"]
    # Two operations per weight of two bytes and token.
    flops = weights * point["tokens"]
    return max(bytes_ / rates["copy_gb_per_s"] / 1e6, flops / rates["matmul_gflop_per_s"] / 1e6)


def _steps(results: Results, bars: Bars) -> Iterator[str]:
    points, rates = _points(results, "steps"), _rates(results)

    def ms(part: str, blocks: int) -> float | None:
        found = points.get(f"{part}/steps/512/{blocks}/1")
        return found["ms"] if found else None

    for d2f, ar in fit.PAIRS.items():
        mine, other = ms(d2f, 4), ms(ar, 1)
        ratio = mine / other if mine and other else None
        bars.at_most(f"{d2f}, 4 blocks of 32, 1 request: step / {ar}'s", ratio, 1.25, "x")
        if d2f == "dream":
            bars.at_most("the same step", mine, 5.5, " ms")
    for part in fit.PAIRS:
        found = points.get(f"{part}/memory")
        lost = next((k for k in _settled_badly(results, "steps") if k == f"{part}/memory"), None)
        met = None if not (found or lost) else bool(found and found["requests"] == 256)
        bars.holds(f"{part}: 256 requests with windows of 128 fit", met)
    table = {key: p for key, p in points.items() if "/steps/" in key}
    if not table:
        return
    ar_parts = fit.PAIRS.values()
    yield from ("## Steps", "", *_gains(table))
    for part in STEPS:
        if start := points.get(f"{part}/start"):
            yield (
                f"- {part}: {start['attention']}, graphs {start['cudagraph_mode']}, async "
                f"scheduling {start['async_scheduling']}, {start['cache_tokens']} positions cached,"
                f" started in {start['seconds']:.0f} s"
            )
    yield from ("", "| shape | context | blocks | requests | ms | floor ms | x floor | host ms |")
    yield "|---|---|---|---|---|---|---|---|"
    for key, point in table.items():
        part, _, context, blocks, requests = key.split("/")
        cells = ["", ""]
        if rates:
            floor = step_floor_ms(part, point, rates)
            cells = [f"{floor:.3f}", f"{point['ms'] / floor:.2f}"]
        yield (
            f"| {part} | {context} | {blocks if part not in ar_parts else ''} | {requests} | "
            f"{point['ms']:.3f} | {cells[0]} | {cells[1]} | {point['host_ms']:.3f} |"
        )
    yield ""


def _gains(table: Mapping[str, Any]) -> Iterator[str]:
    """Steps with FULL graphs or asynchronous scheduling, as a ratio to the same without."""
    for variant, words in (("full", "FULL graphs"), ("async", "asynchronous scheduling")):
        ratios = {}
        for key, point in table.items():
            part, _, case = key.partition("/")
            plain = table.get(f"{part.removesuffix(f'-{variant}')}/{case}")
            if part.endswith(f"-{variant}") and plain:
                _, _, blocks, requests = case.split("/")
                ratios[f"{requests} x {blocks}"] = point["ms"] / plain["ms"]
        if ratios:
            cells = ", ".join(f"{case}: {ratio:.3f}" for case, ratio in ratios.items())
            yield f"Step with {words} / without, by requests x blocks: {cells}."
            yield ""


def _speed(results: Results, bars: Bars) -> Iterator[str]:
    points = _points(results, "steps")
    for d2f, ar in fit.PAIRS.items():
        for size in (1, 2, 4, 8):
            mine = points.get(f"{d2f}/speed/{fit.RATE:g}/{size}")
            other = points.get(f"{ar}/speed/1/{size}")
            ratio = mine["tokens_per_s"] / other["tokens_per_s"] if mine and other else None
            bars.at_least(
                f"{d2f} at {fit.RATE:g} tokens per forward / {ar}, batch {size}", ratio, 2.5, "x"
            )  # noqa: E501
    lines: list[str] = []
    for d2f, ar in fit.PAIRS.items():
        try:
            found = fit.analyse(points, d2f)
        except fit.NotEnough:
            bars.at_most(f"{d2f}: prediction of where {ar} overtakes is off by", None, 10, " %")
            continue
        predicted, measured = found["crossing_predicted"], found["crossing_measured"]
        off = None
        if predicted and measured:
            off = 100 * abs(predicted / measured - 1)
        elif predicted != measured:
            off = 100.0  # one says never
        bars.at_most(f"{d2f}: prediction of where {ar} overtakes is off by", off, 10, " %")
        lines.append(
            f"{d2f} against {ar} at {fit.RATE:g} tokens per forward: AR overtakes at a batch of "
            f"{measured or 'none measured'} (predicted {predicted or 'none'})."
        )
        lines += [
            "",
            "| batch | D2F tok/s | AR tok/s | ratio | ratio predicted |",
            "|---|---|---|---|---|",
        ]
        d, a = ({c["batch_size"]: c for c in found[kind]["checks"]} for kind in ("d2f", "ar"))
        for size, ratio in found["ratio_measured"].items():
            lines.append(
                f"| {size} | {d[int(size)]['measured']:.0f} | {a[int(size)]['measured']:.0f} | "
                f"{ratio:.2f} | {found['ratio_predicted'][size]:.2f} |"
            )
        lines.append("")
    table = {key: p for key, p in points.items() if "/speed/" in key}
    if not table:
        return
    yield from (
        "## Tokens per second",
        "",
        "Simulated acceptance: speeds mean something, text not.",
    )
    yield from ("", *lines)
    yield "| shape | tokens per forward | batch | tok/s | steps | first token ms | peak MiB |"
    yield "|---|---|---|---|---|---|---|"
    for key, p in table.items():
        part, _, rate, batch = key.split("/")
        yield (
            f"| {part} | {rate} | {batch} | {p['tokens_per_s']:.0f} | {p['steps']} | "
            f"{p['first_token_ms']:.1f} | {p['peak_mib']:.0f} |"
        )
    yield ""


def _parity(results: Results, bars: Bars) -> Iterator[str]:
    points = _points(results, "parity")
    shown = {key: p for key, p in points.items() if not key.endswith("/reference")}
    score = {key.split("/")[0]: p["score"] for key, p in points.items() if key not in shown}
    exact = [p for key, p in shown.items() if "/float32/" in key]
    equal = all(p["equal_answers"] == p["answers"] for p in exact)
    bars.holds("float32 answers equal the reference's", equal if exact else None)
    lost = [
        p["score"] - score[key.split("/")[0]]
        for key, p in shown.items()
        if key.split("/")[0] in score
    ]
    bars.at_least("bfloat16 score - the reference's, worst", min(lost, default=None), -0.02)
    same = backends_agree(points)
    bars.holds(
        "FLASH_ATTN, TRITON_ATTN and CUSTOM give the same tokens (bfloat16)",
        None if not same else all(share == 1 for share in same.values()),
    )
    if not shown:
        return
    yield from ("## Engine against reference", "")
    for part, value in score.items():
        yield f"- {part}: the reference's score is {value:.1%}"
    yield from ("", "| model | backend | type | mode | equal answers | equal tokens | score |")
    yield "|---|---|---|---|---|---|---|"
    for key, p in shown.items():
        yield (
            f"| {' | '.join(key.split('/'))} | {p['equal_answers']} of {p['answers']} | "
            f"{p['equal_tokens']:.2%} | {p['score']:.1%} |"
        )
    yield ""
    for pair, share in same.items():
        yield f"- {pair}: {share:.1%} of answers equal"
    yield ""


def backends_agree(points: Mapping[str, Any]) -> dict[str, float]:
    """Share of equal answers of each backend with the first one of its model and mode."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for key, point in points.items():
        if "/bfloat16/" in key:
            part, backend, _, mode = key.split("/")
            groups.setdefault((part, mode), {})[backend] = point["answers_list"]
    shares = {}
    for (part, mode), by_backend in groups.items():
        first, *others = by_backend
        for other in others:
            pairs = list(zip(by_backend[first], by_backend[other], strict=True))
            name = f"{part}, {mode}: {first} and {other}"
            shares[name] = sum(a == b for a, b in pairs) / len(pairs)
    return shares


def _kernels(results: Results) -> Iterator[str]:
    points, rates = _points(results, "kernels"), _rates(results)
    backend = [p for key, p in points.items() if key.startswith("backend/")]
    confidence = {key: p for key, p in points.items() if key.startswith("confidence/")}
    if not (backend or confidence or "tests/gpu" in points):
        return
    yield from ("## Kernels", "")
    if backend:
        worst = max(p["max_error"] / p["allowed"] for p in backend)
        yield f"- FlashInfer backend: {len(backend)} kinds of batches, worst error {worst:.0%} of"
        yield "  what is allowed against float64"
    if tests := points.get("tests/gpu"):
        yield f"- pytest -m gpu: {tests}"
    if confidence:
        yield from ("", "| vocabulary | rule | rows | ms | floor ms | x floor | error |")
        yield "|---|---|---|---|---|---|---|"
    for key, p in confidence.items():
        _, model, rule, rows = key.split("/")
        floor = p["ms"] * p["logits_gb_per_s"] / rates["copy_gb_per_s"] if rates else None
        cells = ("", "") if floor is None else (f"{floor:.4f}", f"{p['ms'] / floor:.2f}")
        yield (
            f"| {model} | {rule} | {rows} | {p['ms']:.4f} | {cells[0]} | {cells[1]} | "
            f"{p['relative_error']:.1e} |"
        )
    yield ""


def _profile(results: Results) -> Iterator[str]:
    points = _points(results, "profile")
    if not points:
        return
    yield from ("## One step under the profiler", "")
    for key, p in points.items():
        part, requests = key.split("/")
        yield f"### {part}, {requests} request(s)"
        yield ""
        yield (
            f"{p['wall_ms_per_step']:.3f} ms with the profiler on; device busy "
            f"{p['device_busy_ms']:.3f} ms, idle {p['device_idle_ms']:.3f} ms, "
            f"{p['kernels_per_step']:.0f} kernels."
        )
        yield from ("", "| kernel | ms per step | calls | share |", "|---|---|---|---|")
        for kernel in p["top_kernels"][:12]:
            name = kernel["name"][:70].replace("|", "/")
            yield (
                f"| {name} | {kernel['ms_per_step']:.4f} | {kernel['per_step']:.0f} | "
                f"{kernel['share']:.1%} |"
            )
        yield ""
        for wait, found in p["waits"].items():
            yield f"- {wait}: {found['per_step']:g} per step, {found['ms_per_step']:.3f} ms"
        yield ""


def _training(results: Results) -> Iterator[str]:
    points = _points(results, "training")
    if not points:
        return
    yield from ("## Embedded models trained again", "")
    if found := points.get("evaluate/all"):
        report = found["report"]
        yield from ("| model | exact | final | minutes |", "|---|---|---|---|")
        minutes = list(report["training_minutes"].values())
        for (name, f), spent in zip(report["figures"].items(), minutes, strict=False):
            yield f"| {name} | {f['exact']:.1%} | {f['final']:.1%} | {spent} |"
    if packed := points.get("pack/models"):
        yield f"- {packed['file']}: {packed['bytes'] / 1e6:.1f} MB"
    yield ""


def _settled_badly(results: Results, stage: str) -> dict[str, str]:
    data = results.get(stage, {})
    return {**data.get("skipped", {}), **data.get("failed", {})}


def _left_out(results: Results) -> Iterator[str]:
    """What is not there, and why."""
    yield from ("## Not measured", "")
    for stage in STAGES:
        data = results.get(stage.name)
        if data is None:
            yield f"- {stage.name}: the whole stage"
            continue
        for part in stage.parts:
            if part not in data["finished"]:
                yield f"- {stage.name}/{part}: not finished"
        for kind in ("failed", "skipped"):
            for key, reason in data[kind].items():
                yield f"- {stage.name} {key}: {kind}, {reason}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="folder of results")
    parser.add_argument("--out", type=Path, help="write here instead of printing")
    args = parser.parse_args(argv)
    try:
        text = document(collect(args.results), "python -m benchmarks.gpu.report gpu-results")
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
