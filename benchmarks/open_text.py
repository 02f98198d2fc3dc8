# SPDX-License-Identifier: Apache-2.0
"""Open-ended text: D2F over thresholds against its autoregressive twin, at the same length.

    python -m benchmarks.open_text                                # the embedded models
    python -m benchmarks.open_text --d2f FOLDER --ar FOLDER --dtype bfloat16 \\
        --original HuggingFaceTB/SmolLM2-135M-Instruct

No answer is right here, so other figures stand for quality: the perplexity of an answer under the
autoregressive model from which training started (`--original`), and its n-grams that are no
repetition. Both change with the length. So the two answers to a prompt are cut to the shorter one
before they are compared, and the lengths stand beside. A low perplexity alone is no quality: text
that repeats itself has one.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from benchmarks.harness.record import Record, UsageError, on_gpu
from benchmarks.harness.timing import rounded
from benchmarks.harness.worker import most_modes
from benchmarks.harness.workload import (
    Item,
    d2f_model,
    parse_options,
    refuse_simulated,
    resolve_model,
)
from benchmarks.tasks.jobs import asked
from training.intervals import difference, interval

PROMPTS = Path(__file__).parent / "tasks" / "open_text.txt"
TWIN = "ar"
UNITS = {
    "length": "tokens of an answer up to its end token, mean",
    "compared": "prompts to which both have answered; what follows is of these, at the same length",
    "perplexity": "under the original; `ar_` is of the twin's answers cut to the same lengths",
    "perplexity_ratio": "over that of the twin, with its 95 % interval over the prompts",
    "distinct_1": "different n-grams of an answer over all of them, n from 1 to 3",
}


def distinct(ids: Sequence[int], n: int) -> tuple[float, float]:
    """Count the different n-grams of an answer, and all of them."""
    grams = list(zip(*(ids[at:] for at in range(n)), strict=False))
    return float(len(set(grams))), float(len(grams))


def surprises(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Return the negative log-likelihood of each token of an answer behind its prompt, in nats."""
    import torch

    if not answer:
        return []
    ids_1T = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.inference_mode():
        logits_TV = model(ids_1T).logits[0, len(prompt) - 1 : -1]
    nats_T = -logits_TV.float().log_softmax(-1)[range(len(answer)), list(answer)]
    return [round(value, 5) for value in nats_T.tolist()]


def compare(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Return the figures of our answers and of the twin's, each pair cut to the shorter one.

    An answer has token `ids` of the original's tokenizer and their `nats`.
    """
    lengths = [min(len(a["ids"]), len(b["ids"])) for a, b in zip(ours, theirs, strict=True)]
    row: dict[str, Any] = {"compared": sum(n > 0 for n in lengths)}
    if not row["compared"]:
        return row
    cut = [
        [(a["ids"][:n], a["nats"][:n]) for a, n in zip(answers, lengths, strict=True) if n]
        for answers in (ours, theirs)
    ]
    our, their = ([(sum(one), float(len(one))) for _, one in answers] for answers in cut)
    for name, value in (
        ("perplexity", interval(our)),
        ("ar_perplexity", interval(their)),
        ("perplexity_ratio", difference(our, their)),
    ):
        middle, *ends = (rounded(math.exp(nats)) for nats in value)
        row |= {name: middle, f"{name}_interval": ends}
    for n in (1, 2, 3):
        for name, answers in zip(("", "ar_"), cut, strict=True):
            different, of = map(sum, zip(*(distinct(ids, n) for ids, _ in answers), strict=True))
            row[f"{name}distinct_{n}"] = rounded(different / of) if of else None
    return row


def build(prompts: Sequence[str], answers: Mapping[str, Any], nats: Mapping[str, Any]) -> Any:
    """Return the report's parts, from each decoder's answers and what the original says of them."""
    rows = [
        {
            "decoder": name, "answers": len(of),
            "length": rounded(sum(one["useful"] for one in of) / len(of)),
            "tokens_per_forward": rounded(
                sum(one["useful"] for one in of) / sum(one["forwards"] for one in of)
            ),
            **compare(nats[name], nats[TWIN]),
        }
        for name, of in answers.items()
    ]  # fmt: skip
    examples = [
        {"prompt": prompt, **{name: of[at]["text"] for name, of in answers.items()}}
        for at, prompt in enumerate(prompts[:3])
    ]
    return {"prompts": len(prompts), "units": UNITS, "rows": rows, "examples": examples}


def markdown(report: Mapping[str, Any]) -> list[str]:
    models = ", ".join(f"{what}: {name}" for what, name in report["models"].items())
    about = f"{models}; at most {report['max_tokens']} tokens, greedy, {report['dtype']}."
    keys = "decoder answers length tokens_per_forward compared perplexity ar_perplexity "
    keys += "perplexity_ratio perplexity_ratio_interval "
    keys += " ".join(f"distinct_{n} ar_distinct_{n}" for n in (1, 2, 3))
    lines = [*record.head("Open-ended text at the same length", report), about, ""]
    lines += [f"- `{name}`: {unit}" for name, unit in report["units"].items()]
    lines += ["", *record.columns(keys, report["rows"])]
    for example in report["examples"]:
        for name, text in example.items():
            lines += [f"**{name}**: {' '.join(text.split())}", ""]
    return lines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("open_text", __doc__)
    add = parser.add_argument
    add("--d2f", default="d2f-tiny", help="D2F model: name, folder or Hub id")
    add("--ar", default="ar-tiny", help="its autoregressive twin")
    add("--original", default="ar-tiny", help="the model whose perplexity counts")
    add("--tau-conf", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    add("--data", help="a prompt per line (default: 64 prompts in benchmarks/tasks)")
    add("--prompts", type=int, default=64)
    add("--batch-size", type=int, default=16)
    add("--max-tokens", type=int, default=200)
    add("--max-model-len", type=int, default=512)
    add("--dtype", default="float32", help="data type of all models")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for both engines")
    quick = {"prompts": 4, "max_tokens": 32}
    return parser.finish(argv, quick, ("prompts", "batch_size", "max_tokens"))


def load_prompts(data: str | None, count: int) -> list[str]:
    """Return the first lines of a file."""
    try:
        lines = Path(data or PROMPTS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--data {data}: {error!r}; pass a file with a prompt per line") from None
    if len(lines) < count:
        raise UsageError(f"--data: {len(lines)} prompts, {count} are needed; pass fewer --prompts")
    return lines[:count]


def original_of(name: str) -> str:
    """Return the folder or Hub id of the original; one from the package index is in its place."""
    from vllm_d2f.hub.wheel import folder_of_base

    kept = folder_of_base(name)
    return str(kept) if (kept / "config.json").is_file() else resolve_model("--original", name)


def open_text(run: Record) -> None:
    """Let every decoder answer, ask the original about the answers, and report."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = run.args
    d2f, config, settings = d2f_model("--d2f", args.d2f)
    refuse_simulated(f"--d2f {args.d2f}", config, "the quality")
    ar, original = resolve_model("--ar", args.ar), original_of(args.original)
    prompts = load_prompts(args.data, args.prompts)
    options = {"max_model_len": args.max_model_len, "dtype": args.dtype}
    options |= parse_options("--engine-args", args.engine_args)
    try:
        thresholds = {f"d2f {tau}": replace(settings.params, tau_conf=tau) for tau in args.tau_conf}
    except ValueError as error:
        raise UsageError(f"--tau-conf: {error}") from None
    decoders = {ar: {TWIN: None}, d2f: thresholds}

    @contextmanager
    def engine(model: str) -> Iterator[Any]:
        from benchmarks.harness.engine import Engine, shut_down

        most = {"max_batch": args.batch_size, "max_tokens": args.max_tokens}
        found = Engine(model, mode=most_modes()[0], **most, options=options)
        yield found
        shut_down(found.llm)

    def answer(found: Any, params: Any, items: Sequence[Item]) -> Any:
        from benchmarks.harness.engine import greedy

        found.sampling = greedy(args.max_tokens, params)
        return [a for batch in found.measure(items, args.batch_size) for a in batch.answers]

    for model, ways in decoders.items():
        if all(run.settled(name) for name in ways):
            continue
        tokenizer = AutoTokenizer.from_pretrained(model)
        items = [Item(asked(tokenizer, prompt), float("nan")) for prompt in prompts]
        with engine(model) as found:
            for name, params in ways.items():
                run.point(name, partial(answer, found, params, items))
    run.need_all()
    answers = {name: run.points[name] for ways in decoders.values() for name in ways}
    tokenizer = AutoTokenizer.from_pretrained(original)
    judge = AutoModelForCausalLM.from_pretrained(original, dtype=args.dtype).eval()
    judge.to("cuda" if on_gpu() else "cpu")

    def judged(name: str) -> Any:
        rows = []
        for prompt, one in zip(prompts, answers[name], strict=True):
            ids = tokenizer(one["text"], add_special_tokens=False).input_ids
            before = tokenizer(asked(tokenizer, prompt)).input_ids
            rows.append({"ids": ids, "nats": surprises(judge, before, ids)})
        return rows

    nats = {name: run.point(f"{name}, judged", partial(judged, name)) for name in answers}
    run.need_all()
    about = {name: getattr(args, name) for name in ("max_tokens", "dtype")}
    about["models"] = {name: getattr(args, name) for name in ("d2f", "ar", "original")}
    run.write(run.report(**about, **build(prompts, answers, nats)))


main = record.command(parse, open_text, markdown)

if __name__ == "__main__":
    sys.exit(main())
