# SPDX-License-Identifier: Apache-2.0
"""Stage c: the engine on the device against the reference loop on the CPU.

`tiny` is d2f-tiny as it is (heads of 32, which FlashInfer has no kernels for); `wide` the same
function with heads of 128, see `widen`. A point is an attention backend and a type. float32 is
compared token by token and forward by forward; in bfloat16 answers may differ where two tokens are
nearly equal, so the share of equal answers and tokens, and the score, are given beside those of the
reference. All backends are compared with one another.
"""

import json
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Options, Points, Skip
from benchmarks.parity import Answer, Case

BACKENDS = ("CUSTOM", "FLASH_ATTN", "TRITON_ATTN")
FLOAT32 = ("TRITON_ATTN",)
"""Backends that take float32."""
ONE_POINT_PER_PROCESS = True
"""Each point starts an engine, and what an engine leaves behind must not meet the next one."""
MAX_TOKENS = 64
MAX_MODEL_LEN = 512
WIDEN = 4


def points(part: str, options: Options) -> Points:
    prompts = 6 if options.rehearse else 40 if options.quick else 200
    refer = cache(lambda: reference(part, options, prompts))

    def reference_point() -> dict[str, Any]:
        answers = refer()
        return {
            "prompts": prompts,
            "score": score([a.tokens for a in answers], part, options),
            "tokens_per_forward": round(
                sum(len(a.tokens) for a in answers) / sum(a.forwards for a in answers), 3
            ),
            "answers_list": [[list(a.tokens), a.forwards] for a in answers],
        }

    yield f"{part}/reference", reference_point
    for backend, dtype, mode in variants(part, options):

        def compare(backend: str = backend, dtype: str = dtype, mode: str = mode) -> dict[str, Any]:
            got = engine_answers(part, options, backend, dtype, mode, prompts)
            return {
                **agreement(refer(), got, dtype),
                "score": score([a.tokens for a in got], part, options),
                "answers_list": [[list(a.tokens), a.forwards] for a in got],
            }

        yield f"{part}/{backend}/{dtype}/{mode}", compare


def variants(part: str, options: Options) -> list[tuple[str, str, str]]:
    """Backend, type, and which CUDA graphs are used."""
    if options.rehearse:
        return [("CPU_ATTN", "float32", "eager")]
    backends = BACKENDS if part == "wide" else BACKENDS[1:]
    out = [(backend, "bfloat16", mode) for backend in backends for mode in ("graphs", "eager")]
    if "CUSTOM" in backends:
        out.append(("CUSTOM", "bfloat16", "full"))
    return out + [(backend, "float32", "eager") for backend in FLOAT32 if backend in backends]


def model_folder(part: str, options: Options) -> Path:
    """d2f-tiny, or the widened one, written when first asked for."""
    from benchmarks.gpu.widen import widen
    from vllm_d2f.hub.names import resolve

    source = Path(resolve("d2f-tiny"))
    if part == "tiny":
        return source
    target = options.work / f"d2f-tiny-wide{WIDEN}"
    if not (target / "model.safetensors").exists():
        widen(source, target, WIDEN)
    return target


def cases(part: str, options: Options, prompts: int) -> list[Case]:
    """Generated problems of the test split."""
    from transformers import AutoConfig, AutoTokenizer

    from training.arithmetic import problems
    from vllm_d2f import register
    from vllm_d2f.settings import settings_from_dict

    register()
    folder = str(model_folder(part, options))
    params = settings_from_dict(AutoConfig.from_pretrained(folder).d2f).params
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [item.question for item in problems("test", prompts, 0)]
    return [Case(tuple(tokenizer(q).input_ids), params, MAX_TOKENS) for q in questions]


def reference(part: str, options: Options, prompts: int) -> list[Answer]:
    """The reference's answers, float32 on the CPU; kept for the part's other processes."""
    from benchmarks.parity import reference_answers

    known = options.work / f"reference-{part}-{prompts}.json"
    if known.exists():
        return [
            Answer(tuple(tokens), forwards) for tokens, forwards in json.loads(known.read_text())
        ]
    asked = cases(part, options, prompts)
    expected = reference_answers(str(model_folder(part, options)), asked, MAX_MODEL_LEN)
    answers = [e.answer for e in expected]
    options.work.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps([[a.tokens, a.forwards] for a in answers]))
    return answers


def engine_answers(
    part: str, options: Options, backend: str, dtype: str, mode: str, prompts: int
) -> list[Answer]:
    """All prompts at once, then half of them again one by one: the batch must not matter.

    Raises:
        Skip: the backend does not serve this model here.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from benchmarks.parity import engine_answers as decode
    from benchmarks.parity import shut_down, start_engine

    asked = cases(part, options, prompts)
    given: dict[str, Any] = dict(dtype=dtype, enforce_eager=mode == "eager", block_size=32)
    if backend != "CPU_ATTN":
        given["attention_backend"] = backend
    params = asked[0].params
    window = params.window
    if mode == "full":
        given["compilation_config"] = {"cudagraph_mode": "FULL_AND_PIECEWISE"}
        # FULL graphs are those of the served block size.
        served = {"block_size": params.block_size, "max_blocks": params.max_blocks}
        given["additional_config"] = {"d2f": {**served, "window": window}}
    folder = str(model_folder(part, options))
    try:
        llm = start_engine(folder, window=window, max_model_len=MAX_MODEL_LEN, **given)
    except (ImportError, ValueError) as error:
        raise Skip(f"{backend} with {dtype}: {str(error)[:400]}") from error
    order = list(range(len(asked)))
    random.Random(0).shuffle(order)
    mixed = decode(llm, [asked[i] for i in order], "batch")
    answers = [answer for _, answer in sorted(zip(order, mixed, strict=True), key=lambda x: x[0])]
    alone = asked[: max(2, len(asked) // 10)]
    if dtype == "float32":
        single = decode(llm, alone, "single")
        if single != answers[: len(alone)]:
            raise AssertionError("an answer depends on the batch")
    shut_down(llm)
    return answers


def agreement(expected: list[Answer], got: list[Answer], dtype: str) -> dict[str, Any]:
    """Shares of equal answers, tokens up to the first difference, and forwards.

    Raises:
        AssertionError: float32 answers differ in more than two of a hundred, which ties explain.
    """
    equal = sum(a.tokens == b.tokens for a, b in zip(expected, got, strict=True))
    forwards = sum(a.forwards == b.forwards for a, b in zip(expected, got, strict=True))
    same = total = 0
    for a, b in zip(expected, got, strict=True):
        total += max(len(a.tokens), len(b.tokens))
        same += sum(x == y for x, y in zip(a.tokens, b.tokens, strict=False))
    if dtype == "float32" and equal < 0.98 * len(expected):
        raise AssertionError(f"float32: {equal} of {len(expected)} answers equal the reference's")
    return {
        "answers": len(expected),
        "equal_answers": equal,
        "equal_forwards": forwards,
        "equal_tokens": round(same / total, 5),
    }


def score(tokens: list[tuple[int, ...]], part: str, options: Options) -> float:
    """Share of answers that are the expected text to the letter."""
    from transformers import AutoTokenizer

    from training.arithmetic import problems

    items = list(problems("test", len(tokens), 0))
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder(part, options)))
    texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in tokens]
    right = sum(text == item.answer for text, item in zip(texts, items, strict=True))
    return round(right / len(items), 4)
