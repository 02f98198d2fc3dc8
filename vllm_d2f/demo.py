# SPDX-License-Identifier: Apache-2.0
"""A D2F model and an autoregressive model of its size answer 16 problems in stock vLLM.

    python -m vllm_d2f.demo [--model d2f-tiny] [--baseline ar-tiny] [--json FILE]
    python -m vllm_d2f.demo --text

`--text` lets SmolLM2-135M-Instruct, trained with D2F, write the facts of eight sentences as JSON,
beside its autoregressive twin. People wrote the sentences for the E2E challenge (CC BY-SA 4.0);
neither model has seen them. Answers appear as they are decoded.

Both run in this process, one after the other, with the same settings: float32 on a CPU, greedy,
no compilation. Tokens are counted up to and including the end token. An autoregressive model needs
one forward per token. vLLM counts the forwards of a D2F request, of which the first includes the
prompt.
"""

import argparse
import json
import logging
import os
import platform
import re
import statistics
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_d2f import __version__
from vllm_d2f.metrics import denoising_forwards
from vllm_d2f.output import ends_with_its_pipe, output_file

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

MAX_TOKENS = 128
REPEATS = 3
WIDTH = 100
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ENVIRONMENT = {
    # One process starts sooner, and no message passing is timed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # With more threads than idle cores, every operator waits for the operating system.
    "OMP_NUM_THREADS": "1",
    # The warnings of a plain start are nothing that a newcomer could act on.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Defaults of this process's environment."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its answer, and the number at its end; None if the whole answer counts."""

    question: str
    answer: str
    final: int | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What one model did with the problems."""

    model: str
    problems: int
    right: int  # problems whose answer ended with the right number
    tokens: int  # of all requests, as the forwards are
    forwards: int
    batch_tokens_per_s: float  # all problems in one batch, median of `REPEATS` runs
    single_tokens_per_s: float  # one problem after the other


def bundled_problems(name: str = "problems") -> list[Problem]:
    """Return the problems that ship with the package. No model was trained on them."""
    file = resources.files("vllm_d2f").joinpath("embedded", f"{name}.json")
    return [Problem(**problem) for problem in json.loads(file.read_text())]


def final_number(text: str) -> float | None:
    """Return the last number of a text, None if it has none. The digits of `1-23` are 1 and 23.

    A number may have thousands with commas or a fraction: 1,234 and 2.5.
    """
    numbers = NUMBER.findall(re.sub(r"(?<=\d)-", " ", text))
    return float(numbers[-1].replace(",", "")) if numbers else None


def is_right(output: "RequestOutput", problem: Problem) -> bool:
    """Return whether the model ended the answer by itself, with the right number."""
    completion = output.outputs[0]
    text = completion.text
    right = text == problem.answer if problem.final is None else final_number(text) == problem.final
    return completion.finish_reason == "stop" and right


def count_forwards(output: "RequestOutput") -> int:
    """Return the forwards that a request took part in: for an autoregressive model its tokens."""
    completion = output.outputs[0]
    autoregressive = completion.spec_decode_metrics is None
    return len(completion.token_ids) if autoregressive else denoising_forwards(completion)


def run(model: str, problems: Sequence[Problem], show: bool) -> Figures:
    """Answer all problems in one batch and then one by one; `show` prints bar and answers."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    chat = problems[0].final is None  # these models are asked in a chat, and shown at work
    print(f"\nLoading {model} into vLLM ...", flush=True)
    began = time.perf_counter()
    llm = LLM(
        model=model,
        dtype="float32" if current_platform.is_cpu() else "auto",
        enforce_eager=True,
        max_num_seqs=len(problems),
        kv_cache_memory_bytes=1 << (29 if chat else 27),
        # Each timed run must compute its prompts.
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
    )
    print(f"Loaded in {time.perf_counter() - began:.0f} s.\n", flush=True)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS if chat else MAX_TOKENS // 2)

    def seconds(*prompts: str) -> float:
        began = time.perf_counter()
        llm.generate(list(prompts), sampling, use_tqdm=False)
        return time.perf_counter() - began

    questions = [problem.question for problem in problems]
    if chat:
        chats: Any = ([{"role": "user", "content": question}] for question in questions)
        render: Any = llm.get_tokenizer().apply_chat_template
        questions = [render(c, tokenize=False, add_generation_prompt=True) for c in chats]
    seconds(*questions)  # warms up
    if chat:
        for problem, prompt in zip(problems, questions, strict=True):
            print(f"\n{problem.question}")
            _print_while_decoding(llm, prompt, sampling)
        print(flush=True)
    show = show and not chat
    outputs = llm.generate(questions, sampling, use_tqdm=show)
    if show:
        _print_answers(problems, outputs)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Figures(
        model=model,
        problems=len(problems),
        right=sum(map(is_right, outputs, problems)),
        tokens=tokens,
        forwards=sum(map(count_forwards, outputs)),
        batch_tokens_per_s=tokens / statistics.median(seconds(*questions) for _ in range(REPEATS)),
        single_tokens_per_s=tokens / sum(map(seconds, questions)),
    )


def _print_while_decoding(llm: Any, prompt: str, sampling: "SamplingParams") -> None:
    """Print an answer piece by piece, as the engine's steps bring it."""
    engine, shown = llm.llm_engine, 0
    engine.add_request("shown", prompt, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


def _print_answers(problems: Sequence[Problem], outputs: "Sequence[RequestOutput]") -> None:
    print()
    for number, (problem, output) in enumerate(zip(problems, outputs, strict=True), start=1):
        mark = "right" if is_right(output, problem) else f"WRONG, {problem.final} expected"
        lines = textwrap.wrap(problem.question, WIDTH - 4)
        lines += textwrap.wrap(f"{output.outputs[0].text.strip()}   [{mark}]", WIDTH - 4)
        print(f"{number:2}. " + "\n    ".join(lines))
    print(flush=True)


def summary(figures: Sequence[Figures]) -> str:
    """Return the closing table, one line per model."""
    width = max(len("model"), *(len(Path(f.model).name) for f in figures))
    batch = f"batch of {figures[0].problems}"
    lines = [
        f"{'':{width}}     right  tokens per    tokens/s,    tokens/s,",
        f"{'model':{width}}   answers     forward  {batch:>11}   one by one",
    ]
    for f in figures:
        lines.append(
            f"{Path(f.model).name:{width}}  {f'{f.right} of {f.problems}':>8}"
            f"  {f.tokens / f.forwards:10.2f}"
            f"  {f.batch_tokens_per_s:11.0f}  {f.single_tokens_per_s:11.0f}"
        )
    return "\n".join(lines)


def _machine() -> dict[str, str]:
    """Return what a reader of the figures must know about this machine."""
    from vllm.platforms import current_platform

    return {
        "device": current_platform.get_device_name(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": os.environ["OMP_NUM_THREADS"],
        "python": platform.python_version(),
        "vllm-d2f": __version__,
        **{name: import_module(name).__version__ for name in ("torch", "vllm")},
    }


def _prepare_process() -> None:
    """Set environment and log levels before vLLM and torch are imported; the user's own win."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_LOGGING_LEVEL"] == "ERROR":
        logging.getLogger("vllm").setLevel("ERROR")
        warnings.filterwarnings("ignore", category=FutureWarning)


@ends_with_its_pipe()
def main() -> None:
    """Run the command."""
    about = "A D2F model and its autoregressive twin answer 16 problems in stock vLLM."
    parser = argparse.ArgumentParser(prog="python -m vllm_d2f.demo", description=about)
    parser.add_argument("--text", action="store_true", help="facts of eight sentences, as JSON")
    parser.add_argument("--model", help="a D2F model: name or folder (default: d2f-tiny)")
    parser.add_argument("--baseline", help='a plain model, "" for none (default: ar-tiny)')
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write the figures here"
    )
    options = parser.parse_args()

    _prepare_process()
    problems = bundled_problems("sentences" if options.text else "problems")
    kind, names = "arithmetic problems", ("d2f-tiny", "ar-tiny")
    if options.text:
        kind, names = "sentences", ("d2f-smollm2-extract", "ar-smollm2-extract")
    model = options.model or names[0]
    baseline = names[1] if options.baseline is None else options.baseline
    print(f"{len(problems)} {kind} that no model here was trained on.")
    figures = [run(model, problems, show=True)]
    if baseline:
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()  # the first engine's, so that another can start
        figures.append(run(baseline, problems, show=False))
    print(summary(figures))
    if options.json:
        report = {"machine": _machine(), "figures": [asdict(f) for f in figures]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if not options.text:
        print("\nNext, a pretrained language model on sentences that people wrote: make demo-text")


if __name__ == "__main__":
    main()
