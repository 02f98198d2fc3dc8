# SPDX-License-Identifier: Apache-2.0
"""A D2F model and its autoregressive twin answer 16 problems in stock vLLM.

    python -m vllm_d2f.demo [--model d2f-tiny] [--baseline ar-tiny] [--json FILE]

Both run in this process, one after the other, with the same settings: float32 on a CPU, greedy,
no compilation. Tokens are counted up to and including the end token. A plain model needs one
forward per token; a D2F request's forwards are counted by vLLM, and its prompt rides in the first.
"""

import argparse
import json
import logging
import os
import platform
import re
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_d2f.metrics import denoising_forwards

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

MAX_TOKENS = 64
REPEATS = 3
WIDTH = 100
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the worked answer expected of it, and the number it ends with."""

    question: str
    answer: str
    final: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What a model did with the problems.

    Attributes:
        right: problems whose answer ended in the right number.
        tokens: tokens of all answers.
        forwards: forwards of all requests, counted per request.
        batch_tokens_per_s: all problems in one batch, median of several runs.
        single_tokens_per_s: one problem after the other.
    """

    model: str
    problems: int
    right: int
    tokens: int
    forwards: int
    batch_tokens_per_s: float
    single_tokens_per_s: float

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards


def bundled_problems() -> list[Problem]:
    """The problems that ship with the package. None of them was in the training data."""
    file = resources.files("vllm_d2f").joinpath("embedded", "problems.json")
    return [Problem(**problem) for problem in json.loads(file.read_text())]


def final_number(text: str) -> int | None:
    """The last number of an answer, None if it has none."""
    numbers = NUMBER.findall(text)
    return int(numbers[-1]) if numbers else None


def is_right(output: "RequestOutput", problem: Problem) -> bool:
    """Whether an answer came to its end by itself and its last number is the right one."""
    completion = output.outputs[0]
    return completion.finish_reason == "stop" and final_number(completion.text) == problem.final


def run(model: str, problems: Sequence[Problem], show: bool) -> Figures:
    """Answer all problems with one model: in one batch, then one by one.

    Args:
        show: print a progress bar and every answer.
    """
    llm, sampling = _start(model, len(problems))
    prompts = [problem.question for problem in problems]
    # What comes first pays for memory and code that are touched for the first time.
    llm.generate(prompts, sampling, use_tqdm=False)

    outputs = llm.generate(prompts, sampling, use_tqdm=show)
    if show:
        _print_answers(problems, outputs)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)

    seconds = statistics.median(_timed(llm, prompts, sampling) for _ in range(REPEATS))
    single_seconds = sum(_timed(llm, [prompt], sampling) for prompt in prompts)
    return Figures(
        model=model,
        problems=len(problems),
        right=sum(is_right(o, p) for o, p in zip(outputs, problems, strict=True)),
        tokens=tokens,
        forwards=sum(count_forwards(output) for output in outputs),
        batch_tokens_per_s=tokens / seconds,
        single_tokens_per_s=tokens / single_seconds,
    )


def count_forwards(output: "RequestOutput") -> int:
    """Forwards that a request took part in."""
    completion = output.outputs[0]
    if completion.spec_decode_metrics is None:
        return len(completion.token_ids)
    return denoising_forwards(completion)


def summary(figures: Sequence[Figures]) -> str:
    """The closing table, one line per model."""
    width = max(len("model"), *(len(Path(f.model).name) for f in figures))
    batch = f"batch of {figures[0].problems}"
    lines = [
        f"{'':{width}}  {'right':>8}  {'tokens per':>10}  {'tokens/s,':>11}  {'tokens/s,':>11}",
        f"{'model':{width}}  {'answers':>8}  {'forward':>10}  {batch:>11}  {'one by one':>11}",
    ]
    for f in figures:
        lines.append(
            f"{Path(f.model).name:{width}}  {f'{f.right} of {f.problems}':>8}  "
            f"{f.tokens_per_forward:>10.2f}  {f.batch_tokens_per_s:>11.0f}  "
            f"{f.single_tokens_per_s:>11.0f}"
        )
    return "\n".join(lines)


def _start(model: str, num_problems: int) -> tuple["LLM", Any]:
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    print(f"\nLoading {model} into vLLM ...", flush=True)
    began = time.perf_counter()
    llm = LLM(
        model=model,
        dtype="float32" if current_platform.is_cpu() else "auto",
        enforce_eager=True,
        max_num_seqs=num_problems,
        kv_cache_memory_bytes=1 << 27,
        # An answer must be computed each time it is timed.
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
    )
    print(f"Loaded in {time.perf_counter() - began:.0f} s.\n", flush=True)
    return llm, SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


def _timed(llm: "LLM", prompts: list[str], sampling: Any) -> float:
    began = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - began


def _print_answers(problems: Sequence[Problem], outputs: Sequence["RequestOutput"]) -> None:
    print()
    for number, (problem, output) in enumerate(zip(problems, outputs, strict=True), start=1):
        mark = "right" if is_right(output, problem) else f"WRONG, {problem.final} expected"
        lines = textwrap.wrap(problem.question, WIDTH - 4)
        answer = textwrap.wrap(f"{output.outputs[0].text.strip()}   [{mark}]", WIDTH - 4)
        print(f"{number:2}. " + "\n    ".join(lines + answer))
    print(flush=True)


def _machine() -> dict[str, str]:
    """Where the figures come from."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    return {
        "device": current_platform.get_device_name(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": os.environ["OMP_NUM_THREADS"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
    }


def _prepare_process() -> None:
    """Environment and log levels, before vLLM and torch are imported. The user's own come first."""
    # One process: it starts sooner, and no message passing is timed.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # With more threads than idle cores every operator waits for the scheduler.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Errors only: the warnings of a plain start ask for nothing that a newcomer could do.
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if level == "ERROR":
        logging.getLogger("vllm").setLevel(level)
        warnings.filterwarnings("ignore", category=FutureWarning)


def _stop() -> None:
    """Free what the last engine holds in this process, so that another can start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_d2f.demo",
        description="A D2F model and its autoregressive twin answer 16 problems in stock vLLM.",
    )
    parser.add_argument("--model", default="d2f-tiny", help="a D2F model: name or folder")
    parser.add_argument("--baseline", default="ar-tiny", help='a plain model, "" for none')
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)

    _prepare_process()
    problems = bundled_problems()
    print(f"{len(problems)} arithmetic problems that no model here was trained on.")
    figures = [run(options.model, problems, show=True)]
    if options.baseline:
        _stop()
        figures.append(run(options.baseline, problems, show=False))
    print(summary(figures))
    if options.json:
        report = {"machine": _machine(), "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
