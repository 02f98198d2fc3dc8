# SPDX-License-Identifier: Apache-2.0
"""Tokens per forward and score with LoPA's lookahead branches, in the reference loop.

    python -m benchmarks.lookahead --json benchmarks/results/lookahead.json

A forward over all branches counts as one, as in the paper; on a device it costs as many windows as
there are branches. `--settings K` or `K:MARGIN` are lookaheads beside the anchor, and by how much
one must beat it. 0 lookaheads are D2F, which all others are compared with on the same prompts.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.harness import record
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.timing import rounded
from benchmarks.harness.workload import Item, d2f_model
from benchmarks.tasks.jobs import JOBS, Job, load_job
from training.intervals import difference, interval
from vllm_d2f.d2f import D2FParams

UNITS = {
    "tokens_per_forward": "tokens up to the end token per forward over all branches",
    "branches": "branches per forward, the anchor included",
    "wins": "share of forwards in which a lookahead won",
    "score": "of the job, with its 95 % interval over the prompts",
    "against_d2f": "the score less that of 0 lookaheads, with its 95 % interval",
}


def ask(loaded: Any, job: Job, params: D2FParams, items: Sequence[Item], **how: Any) -> Any:
    """Return for each prompt what is right, of how much, tokens, forwards, branches and wins."""
    from vllm_d2f.lookahead import generate

    forward, config, tokenizer = loaded
    given = {"mask_id": config.mask_token_id, "ends": config.end_token_ids, **how}
    rows = []
    for item in items:
        prompt = tokenizer(item.question).input_ids
        found = generate(forward, prompt, params, shift=config.logits_shift, **given)
        ended = found.tokens[-1] in given["ends"]
        text = tokenizer.decode(found.tokens, skip_special_tokens=True) if ended else ""
        branches, wins = sum(map(len, found.scores)), sum(w > 0 for w in found.winners)
        counts = job.counts(item.answer or "", text)
        rows.append([*counts, len(found.tokens), found.rounds, branches, wins])
    return rows


def build(job: Job, points: Sequence[tuple[int, float, float, Any]]) -> dict[str, Any]:
    """Return the report's parts. A point is lookaheads, margin, tau_conf and what `ask` gave."""
    plain = {tau: [one[:2] for one in rows] for looks, _, tau, rows in points if not looks}
    table = []
    for looks, margin, tau, found in points:
        tokens, forwards, branches, wins = (sum(one[i] for one in found) for i in range(2, 6))
        counts = [(right, of) for right, of, *_ in found]
        score, *ends = interval(counts)
        row = {
            "tau_conf": tau, "lookaheads": looks, "margin": margin,
            "tokens_per_forward": rounded(tokens / forwards),
            "branches": rounded(branches / forwards), "wins": rounded(wins / forwards),
            "score": rounded(score), "score_interval": [rounded(end) for end in ends],
        }  # fmt: skip
        if looks and tau in plain:
            less, *ends = difference(counts, plain[tau])
            row |= {"against_d2f": rounded(less), "against_d2f_interval": [*map(rounded, ends)]}
        table.append(row)
    return {"score": job.score, "prompts": len(points[0][3]), "units": UNITS, "rows": table}


def verdict(report: Mapping[str, Any]) -> str:
    """Say whether lookaheads decode more tokens per forward than D2F where both score as well.

    D2F's point may have another `tau_conf`. A point with lookaheads wins if D2F has one that is
    slower and scores no better, and none that is as fast and scores as well.
    """

    def as_good(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return all(one[key] >= other[key] for key in ("tokens_per_forward", "score"))

    plain = [row for row in report["rows"] if not row["lookaheads"]]
    ahead = [
        row
        for row in report["rows"]
        if row["lookaheads"]
        and any(as_good(row, one) for one in plain)
        and not any(as_good(one, row) for one in plain)
    ]
    if not ahead:
        return (
            "**Lookaheads do not win**: no point with them decodes more tokens per forward than "
            "D2F at its score or a better one."
        )
    best = max(ahead, key=lambda row: row["tokens_per_forward"])
    return (
        f"**Lookaheads win**: {best['tokens_per_forward']:.2f} tokens per forward at a score of "
        f"{best['score']:.1%}, in {best['branches']:.1f} windows per forward."
    )


def markdown(report: Mapping[str, Any]) -> list[str]:
    asked = (
        f"{report['model']}, job `{report['job']}`, {report['prompts']} prompts "
        f"({report['data']}), at most {report['max_tokens']} tokens, greedy, the reference loop."
    )
    about = (
        f"A score is {report['score'].replace('_', ' ')}. Intervals are 95 % over the prompts. A "
        "forward runs all branches, and `wins` are the forwards in which a lookahead won. `margin` "
        "is in nats of mean negative entropy."
    )
    keys = "tau_conf lookaheads margin tokens_per_forward branches wins score score_interval"
    return [
        *record.head("Lookahead branches (LoPA): tokens per forward and score", report),
        *(asked, "", verdict(report), "", about, ""),
        *record.columns(f"{keys} against_d2f against_d2f_interval", report["rows"]),
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("lookahead", __doc__)
    add = parser.add_argument
    add("--model", default="d2f-tiny", help="D2F model: name or folder")
    add("--job", choices=["exact", "extract"], default="exact", help="how answers are scored")
    add("--data", help='JSONL with "prompt" and "response" (default: generated problems)')
    add("--settings", nargs="+", default=["0", "1", "2", "2:0.1", "4"], metavar="K[:MARGIN]")
    add("--tau-conf", type=float, nargs="+", default=[0.9])
    add("--prompts", type=int, default=256)
    add("--max-tokens", type=int, default=64)
    return parser.finish(argv, {"prompts": 8}, ("prompts", "max_tokens"))


def lookahead(run: Record) -> None:
    """Measure every setting and report."""
    from transformers import AutoTokenizer

    from vllm_d2f.models.hf import load_hf
    from vllm_d2f.reference import hf_forward

    args, job = run.args, JOBS[run.args.job]
    folder, _, settings = d2f_model("--model", args.model)
    if settings.block_origin != "prompt_end":
        raise UsageError(f"--model {args.model}: its blocks do not begin where the prompt ends")
    block_causal = settings.prompt_attention == "block_causal"
    try:
        looks = [(int(k), float(m or 0)) for k, _, m in (s.partition(":") for s in args.settings)]
    except ValueError as error:
        raise UsageError(f"--settings: {error}; pass K or K:MARGIN") from None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    items = load_job(args.data, args.prompts, args.seed, tokenizer)
    model, config = load_hf(folder)
    loaded = (hf_forward(model), config, tokenizer)
    keys = [(k, margin, tau) for tau in args.tau_conf for k, margin in looks]
    for k, margin, tau in keys:
        params = replace(settings.params, tau_conf=tau, accept="threshold", min_per_step=1)
        how = {"lookaheads": k, "margin": margin, "max_tokens": args.max_tokens}
        how["prompt_block"] = params.block_size if block_causal else None
        run.point(f"{k} {margin} {tau}", partial(ask, loaded, job, params, items, **how))
    run.need_all()
    parts = build(job, [(*key, run.points["{} {} {}".format(*key)]) for key in keys])
    data = args.data.rpartition("/")[2] if args.data else "generated problems of the test split"
    about = {name: getattr(args, name) for name in ("model", "job", "max_tokens")}
    run.write(run.report(**about, data=data, **parts))


main = record.command(parse, lookahead, markdown)

if __name__ == "__main__":
    sys.exit(main())
