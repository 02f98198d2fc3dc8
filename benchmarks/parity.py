# SPDX-License-Identifier: Apache-2.0
"""Engine against reference, float32 and greedy: the same tokens with the same number of forwards.

    python -m benchmarks.parity                          # d2f-tiny on 200 generated problems
    python -m benchmarks.parity --data gsm8k_test.jsonl  # real questions
    python -m benchmarks.parity --model FOLDER --grid    # 48 settings, all in the same batches
    python -m benchmarks.parity --model d2f-smollm2-extract --chat --data test.jsonl

The engine decodes the requests in each of these ways and every answer is compared:
`batch` all at once; `single` one by one; `arrivals` a few more requests every few steps, so that
prefill and denoising share forwards; `preempt` all at once with so few pages that requests are
preempted; `again` the batch once more with prefix caching on and warm. `bfloat16`, if it is asked
for, is the batch in an engine of that data type, whose differences are counted beside the others.

On a GPU `--attention-backend`, `--dtype` and `--engine-args` choose what is compared. Answers in
bfloat16 and float16 may differ where two tokens are nearly equal, so there the shares of equal
answers and tokens and the score are given, and the exit status is 1 only if the score falls by more
than 0.02. `--head-size` is for backends that lack the heads of a tiny model: the engine serves a
copy with heads of that size, padded with zeros, and the reference decodes the original.
"""

import argparse
import itertools
import math
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from benchmarks.harness.engine import greedy, preemptions, shut_down, start_engine
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.widen import widen
from benchmarks.harness.workload import d2f_model, load_items, load_prompts, parse_options
from benchmarks.tasks.jobs import load_job
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.reference import Forward, decode, hf_forward

WAYS = ("batch", "single", "arrivals", "preempt", "again")

TAUS = ((0.1, 0.95, 0.9), (0.7, 0.95, 0.6), (0.9, 0.5, 0.3))
GRID = [
    D2FParams(block_size, max_blocks, *taus)
    for block_size, max_blocks, taus in itertools.product((4, 8, 16, 32), (1, 2, 4, 8), TAUS)
]
"""Block sizes, window widths and three threshold settings (tau_add, tau_act, tau_conf)."""


@dataclass(frozen=True)
class Case:
    """One request: what goes in."""

    prompt: tuple[int, ...]
    params: D2FParams
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came out: tokens with the end token, and denoising forwards."""

    tokens: tuple[int, ...]
    forwards: int


@dataclass(frozen=True)
class Expected:
    """The reference's answer, and by how little the closest of its decisions was taken."""

    answer: Answer
    margin: float


TIE = 2e-5
"""Probabilities of the two implementations differ by up to this in float32: a decision with a
smaller margin is a tie. An answer that differs after one is counted as a tie, not as equal."""


def make_cases(
    prompts: Sequence[Sequence[int]], settings: Sequence[D2FParams], max_tokens: int
) -> list[Case]:
    """Return every prompt under every setting."""
    return [Case(tuple(p), s, max_tokens) for p in prompts for s in settings]


def reference_answers(
    model: str, cases: Sequence[Case], max_model_len: int, prompt_block: int | None = None
) -> list[Expected]:
    """Decode with the reference loop, on transformers' model with the same weights."""
    from tqdm import tqdm

    forward, config = load_forward(model)
    how: dict[str, Any] = dict(
        mask_id=config.mask_token_id, ends=config.end_token_ids, shift=config.logits_shift,
        max_len=max_model_len, prompt_block=prompt_block, block_origin=config.family.block_origin,
    )  # fmt: skip
    answers = []
    for case in tqdm(cases, desc="reference", disable=None):
        frames = decode(forward, case.prompt, case.params, max_tokens=case.max_tokens, **how)
        margin = math.inf
        for frame in frames:
            margin = min(margin, frame.margin)
        answers.append(Expected(Answer(tuple(frame.tokens), frame.forward), margin))
    return answers


def load_forward(model: str) -> tuple[Forward, Any]:
    """Return a Dream or LLaDA folder as the reference's forward, and its config."""
    from vllm_d2f.models.hf import load_hf

    hf_model, config = load_hf(model)
    return hf_forward(hf_model), config


def sampling_params(case: Case) -> Any:
    """Return the request of a case."""
    return greedy(case.max_tokens, case.params, detokenize=False)


def engine_answers(llm: Any, cases: Sequence[Case], way: str, seed: int = 0) -> list[Answer]:
    """Decode all cases in one of `WAYS` (which engine makes it `preempt` or `again`)."""
    if way == "single":
        return [_answer(_generate(llm, [case])[0]) for case in cases]
    if way == "arrivals":
        return _with_arrivals(llm, cases, random.Random(seed))
    return [_answer(output) for output in _generate(llm, cases)]


def _generate(llm: Any, cases: Sequence[Case]) -> list[Any]:
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    return llm.generate(prompts, [sampling_params(case) for case in cases], use_tqdm=False)


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    return Answer(tuple(completion.token_ids), denoising_forwards(completion))


def _with_arrivals(llm: Any, cases: Sequence[Case], rng: random.Random) -> list[Answer]:
    """Run the engine step by step. Every one to five steps one to four shuffled requests arrive."""
    engine = llm.llm_engine
    order = list(range(len(cases)))
    rng.shuffle(order)
    answers: dict[int, Answer] = {}
    wait = 0
    while order or engine.has_unfinished_requests():
        if order and wait <= 0:
            for _ in range(min(rng.randint(1, 4), len(order))):
                index = order.pop()
                prompt = {"prompt_token_ids": list(cases[index].prompt)}
                engine.add_request(f"case-{index}", prompt, sampling_params(cases[index]))
            wait = rng.randint(1, 5)
        wait -= 1
        if not engine.has_unfinished_requests():
            continue  # with the engine in a process of its own, a step would never return
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id.split("-")[1])] = _answer(output)
    return [answers[i] for i in range(len(cases))]


def differences(
    cases: Sequence[Case], expected: Sequence[Expected], got: Sequence[Answer]
) -> Iterator[dict[str, Any]]:
    """Return what is not equal, with everything needed to look at it alone."""
    for index, (case, known, have) in enumerate(zip(cases, expected, got, strict=True)):
        want = known.answer
        if want != have:
            pairs = zip(want.tokens, have.tokens, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            yield {
                "case": index, "tie": known.margin < TIE, "margin": known.margin,
                "params": asdict(case.params), "prompt": list(case.prompt),
                "first_difference": first, "expected": list(want.tokens), "got": list(have.tokens),
                "expected_forwards": want.forwards, "got_forwards": have.forwards,
            }  # fmt: skip


def engines(ways: Sequence[str], cases: Sequence[Case], max_model_len: int) -> Iterator[tuple]:
    """Yield engine options and the ways that an engine with them serves."""
    if plain := [way for way in ways if way in ("batch", "single", "arrivals")]:
        yield {}, plain
    if "preempt" in ways:
        # Room for about three of the longest requests.
        longest = max(len(c.prompt) + c.max_tokens + c.params.window for c in cases)
        pages = 3 * -(-min(longest, max_model_len) // 32) + 1
        yield {"num_gpu_blocks_override": max(pages, -(-max_model_len // 32) + 1)}, ["preempt"]
    if "again" in ways:
        yield {"enable_prefix_caching": True}, ["again"]
    if "bfloat16" in ways:
        yield {"dtype": "bfloat16"}, ["bfloat16"]


def equal_tokens(expected: Sequence[Expected], got: Sequence[Answer]) -> float:
    """Return the share of tokens that equal the reference's at the same position."""
    pairs = [(e.answer.tokens, g.tokens) for e, g in zip(expected, got, strict=True)]
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return round(same / sum(max(len(a), len(b)) for a, b in pairs), 5)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("parity", __doc__)
    add = parser.add_argument
    add("--model", default="d2f-tiny", help="embedded name or folder")
    add("--prompts", type=int, default=200)
    add("--data", help="JSONL with a `question` per line, for example GSM8K")
    add("--chat", action="store_true", help="--data has prompts and responses, asked as in a chat")
    add("--max-tokens", type=int, default=64)
    add("--max-model-len", type=int, help="default: the model's, at most 1024")
    add("--grid", action="store_true", help="48 settings instead of the model's own")
    add("--ways", nargs="+", choices=[*WAYS, "bfloat16"], default=list(WAYS))
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--head-size", type=int, help="pad the engine's heads with zeros to this size")
    add("--attention-backend", help="of vLLM: CUSTOM (FlashInfer), FLASH_ATTN, TRITON_ATTN")
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for vLLM's engine")
    return parser.finish(argv, {"prompts": 6}, ("prompts", "max_tokens"))


def parity(run: Record) -> int:
    """Decode everything in all ways. Return 1 for differences that rounding does not explain."""
    with tempfile.TemporaryDirectory() as folder:
        return compare_all(run, Path(folder))


def compare_all(run: Record, folder: Path) -> int:
    """Do what `parity` does, with an empty folder for a widened copy of the model."""
    from transformers import AutoTokenizer

    args = run.args
    model, config, defaults = d2f_model("--model", args.model)
    served = model
    if args.head_size:
        try:
            served = str(widen(Path(model), folder / Path(model).name, args.head_size))
        except ValueError as error:
            raise UsageError(f"--head-size {args.head_size}: {error}") from error
    max_model_len = args.max_model_len or min(config.max_position_embeddings, 1024)
    own = defaults.params
    settings = GRID if args.grid else [own]
    scored = args.chat or not (args.grid or args.data) and (Path(model) / "tokenizer.json").exists()
    tokenizer: Any = AutoTokenizer.from_pretrained(model) if scored else None
    if args.chat:
        asked = load_job(args.data, args.prompts, args.seed, tokenizer)
        prompts = [tokenizer(item.question).input_ids for item in asked]
    else:
        asked = load_items(args.prompts, None, args.seed) if scored else []
        prompts = load_prompts(model, args.prompts, args.data, args.seed)
    texts = [item.answer for item in asked]
    prompts = [p[: max_model_len - args.max_tokens] for p in prompts]
    cases = make_cases(prompts, settings, args.max_tokens)
    window = max(case.params.window for case in cases)
    given = {"dtype": args.dtype, **parse_options("--engine-args", args.engine_args)}
    if args.attention_backend:
        given["attention_backend"] = args.attention_backend
    if "compilation_config" in given:
        given.setdefault("enforce_eager", False)  # eager engines compile and capture nothing
    block_causal = defaults.prompt_attention == "block_causal"
    if block_causal or "compilation_config" in given:
        # FULL graphs, and the blocks of a prompt, are those of the served block size.
        section = {"block_size": own.block_size, "max_blocks": own.max_blocks, "window": window}
        given["additional_config"] = {"d2f": section}

    started = time.perf_counter()
    block = own.block_size if block_causal else None
    known = run.point("reference", lambda: reference_answers(model, cases, max_model_len, block))
    run.need_all()
    expected = [
        Expected(Answer(tuple(e["answer"]["tokens"]), e["answer"]["forwards"]), e["margin"])
        for e in known
    ]
    reference_s = time.perf_counter() - started

    def score(answers: Sequence[Answer]) -> float | None:
        """Return the share of answers that equal the expected text exactly."""
        if not texts:
            return None
        found = [tokenizer.decode(list(a.tokens), skip_special_tokens=True) for a in answers]
        return round(sum(a == b for a, b in zip(found, texts, strict=True)) / len(texts), 4)

    def compare(llm: Any, way: str) -> dict[str, Any]:
        if way == "again":
            engine_answers(llm, cases, "batch")
        began = time.perf_counter()
        got = engine_answers(llm, cases, way, args.seed)
        wrong = list(differences(cases, expected, got))
        return {
            "equal": len(cases) - len(wrong), "of": len(cases),
            "ties": sum(item["tie"] for item in wrong), "score": score(got),
            "equal_tokens": equal_tokens(expected, got), "preemptions": preemptions(llm),
            "seconds": round(time.perf_counter() - began, 2), "differences": wrong[:20],
        }  # fmt: skip

    for options, ways in engines(args.ways, cases, max_model_len):
        if run.late or all(run.settled(way) for way in ways):
            continue
        try:
            llm = start_engine(
                served, window=window, max_model_len=max_model_len, **given | options
            )
        except (ImportError, ValueError) as error:
            if not args.attention_backend:
                raise
            raise UsageError(f"--attention-backend {args.attention_backend}: {error}") from error
        for way in ways:
            run.point(way, partial(compare, llm, way))
        shut_down(llm)
        del llm
    run.need_all()
    answers = [e.answer for e in expected]
    rate = sum(len(a.tokens) for a in answers) / sum(a.forwards for a in answers)
    on = run.environment["hardware"].get("gpu", "CPU")
    report = run.report(
        model=Path(args.model).name, prompts=len(prompts), settings=len(settings),
        answers_with_a_tie=sum(e.margin < TIE for e in expected),
        tokens_per_forward=round(rate, 3), reference_seconds=round(reference_s, 1),
        reference_score=score(answers),
        ways={way: run.points[way] for way in args.ways if way in WAYS},
        bfloat16=run.points.get("bfloat16"),
        machine=f"{platform.machine()}, {platform.system()}, {on}, {args.dtype}",
        **({"head_size": args.head_size} if args.head_size else {}),
    )  # fmt: skip
    run.write(report)
    return int(any(not holds(report, row) for row in report["ways"].values()))


def holds(report: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether a way agrees with the reference, ties aside; in 16 bits its score decides."""
    if report["machine"].endswith("float32"):
        return row["equal"] + row["ties"] == row["of"]
    return row["score"] is None or row["score"] >= report["reference_score"] - 0.02


def markdown(report: Mapping[str, Any]) -> list[str]:
    bfloat16 = [report["bfloat16"]] if report.get("bfloat16") else []
    head_size = report.get("head_size")
    return [
        *record.head("Engine against reference", report),
        f"{report['model']}, {report['prompts']} prompts, {report['settings']} setting(s),",
        f"{report['machine']}. The reference: {report['tokens_per_forward']} tokens per forward,",
        f"score {report['reference_score']}; {report['answers_with_a_tie']} answers have a tie.",
        *([f"The engine's heads are padded to {head_size}."] if head_size else []),
        "",
        *record.columns(
            "way equal of ties equal_tokens score agrees",
            ({"way": w, "agrees": holds(report, r), **r} for w, r in report["ways"].items()),
        ),
        *record.columns("equal of equal_tokens score", bfloat16, equal="equal in bfloat16"),
        *(f"- {way}: {item}" for way, r in report["ways"].items() for item in r["differences"][:3]),
    ]


main = record.command(parse, parity, markdown)

if __name__ == "__main__":
    sys.exit(main())
