# SPDX-License-Identifier: Apache-2.0
"""Engine against reference, float32 and greedy: the same tokens with the same number of forwards.

    python -m benchmarks.parity                          # d2f-tiny on 200 generated problems
    python -m benchmarks.parity --data gsm8k_test.jsonl  # real questions
    python -m benchmarks.parity --model FOLDER --grid    # 48 settings, all in the same batches

The engine decodes the requests in each of these ways and every answer is compared:
`batch` all at once; `single` one by one; `arrivals` a few more requests every few steps, so that
prefill and denoising share forwards; `preempt` all at once with so few pages that requests are
preempted; `again` the batch once more with prefix caching on and warm.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.workload import UsageError, environment, resolve_model
from vllm_d2f.d2f import D2FParams
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.reference import Forward, decode, hf_forward

WAYS = ("batch", "single", "arrivals", "preempt", "again")

GRID = [
    D2FParams(block_size, max_blocks, *taus)
    for block_size, max_blocks, taus in itertools.product(
        (4, 8, 16, 32), (1, 2, 4, 8), ((0.1, 0.95, 0.9), (0.7, 0.95, 0.6), (0.9, 0.5, 0.3))
    )
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
    """Every prompt under every setting."""
    return [Case(tuple(p), s, max_tokens) for p in prompts for s in settings]


def reference_answers(
    model: str, cases: Sequence[Case], max_model_len: int, prompt_block: int | None = None
) -> list[Expected]:
    """The reference loop on transformers' model with the same weights."""
    from tqdm import tqdm

    forward, config = load_forward(model)
    answers = []
    for case in tqdm(cases, desc="reference", disable=None):
        frames = decode(
            forward,
            case.prompt,
            case.params,
            max_tokens=case.max_tokens,
            mask_id=config.mask_token_id,
            ends=config.end_token_ids,
            shift=config.logits_shift,
            max_len=max_model_len,
            prompt_block=prompt_block,
        )
        margin = math.inf
        for frame in frames:
            margin = min(margin, frame.margin)
        answers.append(Expected(Answer(tuple(frame.tokens), frame.forward), margin))
    return answers


def load_forward(model: str) -> tuple[Forward, Any]:
    """A Dream or LLaDA folder as the reference's forward, and its config."""
    from vllm_d2f.models.hf import load_hf

    hf_model, config = load_hf(model)
    return hf_forward(hf_model), config


def start_engine(model: str, *, window: int, max_model_len: int, **options: Any) -> Any:
    """An offline engine in float32, set for comparison."""
    from vllm import LLM

    defaults: dict[str, Any] = dict(
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 28,
        block_size=32,
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        additional_config={"d2f": {"block_size": 4, "max_blocks": 1, "window": window}},
    )
    return LLM(model=model, max_model_len=max_model_len, **(defaults | options))


def sampling_params(case: Case) -> Any:
    """The request of a case, as a user would send it."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=case.max_tokens,
        detokenize=False,
        extra_args={f"d2f_{name}": value for name, value in asdict(case.params).items()},
    )


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
    """Drive the engine by hand: shuffled, one to four new requests every one to five steps."""
    engine = llm.llm_engine
    order = list(range(len(cases)))
    rng.shuffle(order)
    answers: dict[int, Answer] = {}
    wait = 0
    while order or engine.has_unfinished_requests():
        if order and wait <= 0:
            for _ in range(min(rng.randint(1, 4), len(order))):
                index = order.pop()
                case = cases[index]
                engine.add_request(
                    f"case-{index}",
                    {"prompt_token_ids": list(case.prompt)},
                    sampling_params(case),
                )
            wait = rng.randint(1, 5)
        wait -= 1
        if not engine.has_unfinished_requests():
            continue  # with the engine in a process of its own, a step would wait for ever
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id.split("-")[1])] = _answer(output)
    return [answers[i] for i in range(len(cases))]


def differences(
    cases: Sequence[Case], expected: Sequence[Expected], got: Sequence[Answer]
) -> Iterator[dict[str, Any]]:
    """What is not equal, with everything needed to look at it alone."""
    for index, (case, known, have) in enumerate(zip(cases, expected, got, strict=True)):
        want = known.answer
        if want != have:
            pairs = zip(want.tokens, have.tokens, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            yield {
                "case": index,
                "tie": known.margin < TIE,
                "margin": known.margin,
                "params": asdict(case.params),
                "prompt": list(case.prompt),
                "first_difference": first,
                "expected": list(want.tokens),
                "got": list(have.tokens),
                "expected_forwards": want.forwards,
                "got_forwards": have.forwards,
            }


def load_prompts(model: str, count: int, data: str | None, seed: int) -> list[list[int]]:
    """Token ids of questions from a JSONL file, of generated problems, or, without a tokenizer,
    at random.

    Raises:
        UsageError: no such file, or a line that is no question.
    """
    folder = Path(model)
    if data is None and not (folder / "tokenizer.json").exists():
        from transformers import AutoConfig

        rng = random.Random(seed)
        top = AutoConfig.from_pretrained(model).vocab_size
        return [[rng.randrange(top) for _ in range(rng.randint(1, 60))] for _ in range(count)]

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if data is not None:
        try:
            lines = Path(data).read_text(encoding="utf-8").splitlines()[:count]
            texts = [json.loads(line)["question"] for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'--data {data}: {error!r}; pass a JSONL file with a "question" per line, or leave '
                "it out"
            ) from None
    else:
        from training.arithmetic import problems

        texts = [problem.question for problem in problems("test", count, seed)]
    return [tokenizer(text).input_ids for text in texts]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="d2f-tiny", help="embedded name or folder")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--data", help="JSONL with a `question` per line, for example GSM8K")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, help="default: the model's, at most 1024")
    parser.add_argument(
        "--grid", action="store_true", help="48 settings instead of the model's own"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="6 problems, under a minute")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args(argv)
    if args.quick:
        args.prompts = 6
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return compare(args, sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Decode everything in all ways; 1 if anything differs.

    Raises:
        UsageError: with what to pass.
    """
    # In this process, so that preemptions can be counted.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from transformers import AutoConfig

    from vllm_d2f import register
    from vllm_d2f.settings import settings_from_dict

    register()
    model = resolve_model("--model", args.model)
    config = AutoConfig.from_pretrained(model)
    if not hasattr(config, "d2f"):
        raise UsageError(f"--model {args.model} is no D2F model: its config has no d2f section")
    max_model_len = args.max_model_len or min(config.max_position_embeddings, 1024)
    settings = GRID if args.grid else [settings_from_dict(config.d2f).params]
    prompts = load_prompts(model, args.prompts, args.data, args.seed)
    prompts = [p[: max_model_len - args.max_tokens] for p in prompts]
    cases = make_cases(prompts, settings, args.max_tokens)
    window = max(case.params.window for case in cases)

    started = time.perf_counter()
    expected = reference_answers(model, cases, max_model_len)
    reference_s = time.perf_counter() - started

    result: dict[str, Any] = {}
    failed = 0
    for options, ways in _engines(args.ways, cases, max_model_len, window):
        llm = start_engine(model, window=window, max_model_len=max_model_len, **options)
        for way in ways:
            if way == "again":
                engine_answers(llm, cases, "batch")
            started = time.perf_counter()
            got = engine_answers(llm, cases, way, args.seed)
            wrong = list(differences(cases, expected, got))
            ties = sum(item["tie"] for item in wrong)
            failed += len(wrong) - ties
            result[way] = {
                "equal": len(cases) - len(wrong),
                "of": len(cases),
                "ties": ties,
                "seconds": round(time.perf_counter() - started, 2),
                "preemptions": preemptions(llm),
                "differences": wrong[:20],
            }
            note = f", {ties} decided by a tie" if ties else ""
            print(f"{way:9s} {len(cases) - len(wrong)} of {len(cases)} equal{note}", flush=True)
            for item in wrong[:3]:
                print(f"  {item}")
        shut_down(llm)
        del llm
    tokens = sum(len(e.answer.tokens) for e in expected)
    forwards = sum(e.answer.forwards for e in expected)
    close = sum(e.margin < TIE for e in expected)
    print(f"answers with a decision closer than {TIE}: {close} of {len(expected)}")
    print(f"reference: {tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} per forward")
    if args.json:
        report = {
            **environment(args.seed, argv, "benchmarks.parity"),
            "model": Path(args.model).name,
            "prompts": len(prompts),
            "settings": len(settings),
            "answers_with_a_tie": close,
            "tokens_per_forward": round(tokens / forwards, 3),
            "reference_seconds": round(reference_s, 1),
            "ways": result,
            "machine": f"{platform.machine()}, {platform.system()}, CPU, float32",
        }
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


def _engines(
    ways: Sequence[str], cases: Sequence[Case], max_model_len: int, window: int
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Engine options and the ways they serve."""
    plain = [way for way in ways if way in ("batch", "single", "arrivals")]
    if plain:
        yield {}, plain
    if "preempt" in ways:
        # Room for about three of the longest requests.
        longest = max(len(c.prompt) + c.max_tokens + c.params.window for c in cases)
        pages = 3 * -(-min(longest, max_model_len) // 32) + 1
        yield {"num_gpu_blocks_override": max(pages, -(-max_model_len // 32) + 1)}, ["preempt"]
    if "again" in ways:
        yield {"enable_prefix_caching": True}, ["again"]


def preemptions(llm: Any) -> int | None:
    """Preemptions so far, where the engine runs in this process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return None if core is None else core.scheduler.num_preempted


def shut_down(llm: Any) -> None:
    """Free the engine's memory before the next one starts."""
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    sys.exit(main())
