# SPDX-License-Identifier: Apache-2.0
"""Scores by lm-eval, with the paper's tasks and settings: a thin driver around `lm_eval`.

    python -m benchmarks.evaluate --task arithmetic                     # d2f-tiny, needs nothing
    python -m benchmarks.evaluate --task gsm8k --model FOLDER --preset dream-gsm8k --data FOLDER
    python -m benchmarks.evaluate --task humaneval --model FOLDER --preset dream-humaneval \\
        --allow-code-execution
    python -m benchmarks.evaluate --task gsm8k --model NAME --server http://localhost:8000

In this process with vLLM (`lm_eval --model vllm`), or against a running `vllm serve`
(`local-completions`). The tasks are the YAML files in benchmarks/tasks, which also work with plain
`lm_eval --include_path benchmarks/tasks`. Questions come from --data or from the Hub.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from benchmarks.harness.record import Record, UsageError
from benchmarks.harness.workload import refuse_simulated, resolve_model
from vllm_d2f.settings import PRESETS

TASKS = ("arithmetic", "gsm8k", "math", "humaneval", "mbpp")
PROGRAMS = ("humaneval", "mbpp")
FOLDER = Path(__file__).with_name("tasks")
PROMPT_ROOM = {"arithmetic": 192, "gsm8k": 1800, "math": 2048, "humaneval": 1024, "mbpp": 1800}
UNITS = {
    "score": "fraction of problems, by lm-eval's metric of that name",
    "prompts_cut": "prompts without their beginning, as the model has too few positions",
}


def task_name(task: str, preset: str | None) -> str:
    """Return the task file for a preset; without one the published Dream form."""
    if task == "arithmetic":
        return "d2f_arithmetic"
    return f"d2f_{task}_{'llada' if preset and preset.startswith('llada') else 'dream'}"


def max_tokens(task: str, preset: str | None) -> int:
    """Return the published length of an answer (the `max_gen_toks` of the task file)."""
    if task == "arithmetic":
        return 64
    return 512 if preset and preset.startswith("llada") else 256


def d2f_section(task: str, preset: str | None) -> dict[str, Any]:
    """Return the preset with a window for the whole answer, as in the paper; {} without one."""
    if preset is None:
        return {}
    section = PRESETS[preset]
    return section | {"max_blocks": -(-max_tokens(task, preset) // section["block_size"])}


def model_call(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `lm_eval.simple_evaluate` needs to reach the model."""
    from transformers import AutoTokenizer

    model = resolve_model("--model", args.model)
    section = d2f_section(args.task, args.preset)
    room = _room(args, model)
    # As the authors' evaluation does.
    bos = bool(
        args.preset
        and args.preset.startswith("dream")
        and AutoTokenizer.from_pretrained(model).bos_token
    )
    if args.server:
        base_url = args.server.rstrip("/").removesuffix("/v1") + "/v1/completions"
        options: dict[str, Any] = dict(
            model=args.model, base_url=base_url, num_concurrent=args.batch_size, max_length=room,
            tokenizer=model, tokenizer_backend="huggingface", add_bos_token=bos,
        )  # fmt: skip
        # A served model's settings travel with each request.
        settings = {"vllm_xargs": {f"d2f_{k}": v for k, v in section.items()}}
        call = {"model": "local-completions", "model_args": options}
        return call | {"gen_kwargs": settings if section else None}
    import torch

    options = dict(pretrained=model, batch_size="auto", max_num_seqs=args.batch_size)
    options["max_model_len"] = room
    if not torch.cuda.is_available():
        options |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    if section:
        options["additional_config"] = {"d2f": section}
    if bos:
        options["add_bos_token"] = True
    return {"model": "vllm", "model_args": options, "gen_kwargs": None}


def _room(args: argparse.Namespace, model: str) -> int:
    """Return the positions for prompt and answer: those asked for, or all that the model has."""
    from transformers import AutoConfig

    wanted = PROMPT_ROOM[args.task] + max_tokens(args.task, args.preset)
    config = AutoConfig.from_pretrained(model)
    refuse_simulated(f"--model {args.model}", config, "the score")
    return args.max_model_len or min(wanted, getattr(config, "max_position_embeddings", wanted))


def cut_prompts(args: argparse.Namespace, samples: Sequence[dict[str, Any]], chat: bool) -> int:
    """Count the prompts whose beginning, with the worked examples, lm-eval had to cut off."""
    from transformers import AutoTokenizer

    model = resolve_model("--model", args.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    most = _room(args, model) - max_tokens(args.task, args.preset)
    prompts = [sample["arguments"][0][0] for sample in samples]
    # A chat template writes the special tokens into the text.
    return sum(len(tokenizer(p, add_special_tokens=not chat).input_ids) > most for p in prompts)


def check(args: argparse.Namespace) -> None:
    """Refuse, before a model is loaded, what is certain to fail."""
    from benchmarks.tasks import data, sandbox

    if args.task == "math" and find_spec("math_verify") is None:
        raise UsageError("--task math is graded with SymPy: pip install 'lm-eval[math]'")
    if args.preset and args.task != "arithmetic" and not args.preset.endswith(f"-{args.task}"):
        known = ", ".join(name for name in PRESETS if name.endswith(f"-{args.task}"))
        raise UsageError(f"--preset {args.preset} is not for --task {args.task}; use {known}")
    try:
        if args.data and args.task != "arithmetic":
            data.read(args.task, Path(args.data), "test")
        if args.task in PROGRAMS:
            if args.allow_code_execution:
                os.environ[sandbox.ALLOW] = "1"
            sandbox.check()
    except (data.DataMissing, sandbox.SandboxError) as error:
        raise UsageError(str(error)) from None


def scores(args: argparse.Namespace) -> dict[str, Any]:
    """Run lm-eval and condense its result."""
    check(args)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        raise UsageError("lm-eval is not installed: pip install 'vllm-d2f[bench]'") from None
    from benchmarks.tasks.data import DataMissing
    from vllm_d2f import register

    register()
    call = model_call(args)
    name = task_name(args.task, args.preset)
    llada = bool(args.preset and args.preset.startswith("llada"))
    chat = args.chat or (llada and args.task in ("gsm8k", "mbpp"))
    where = {"include_path": str(FOLDER), "metadata": {"data": args.data}}
    started = time.perf_counter()
    try:
        found = lm_eval.simple_evaluate(
            **call, tasks=[name], limit=args.limit, bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False, **where),
            apply_chat_template=chat, fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=args.allow_code_execution,
        )  # fmt: skip
    except Exception as error:
        # lm-eval loads the task files as modules of its own, so the class is another one there.
        if type(error).__name__ in (DataMissing.__name__, "SandboxError"):
            raise UsageError(str(error)) from None
        raise
    samples = found["samples"][name]
    found_scores = {
        key.replace(",none", "").replace(",", ":"): round(value, 4)
        for key, value in found["results"][name].items()
        if isinstance(value, float) and not key.split(",")[0].endswith("_stderr")
    }
    counts = found["n-samples"][name]
    return {
        "score": found_scores, "task": name, "shots": found["n-shot"][name],
        "problems": counts["effective"], "of": counts["original"],
        "model": Path(args.model).name, "through": call["model"], "preset": args.preset,
        "d2f": d2f_section(args.task, args.preset) or "the model's own settings",
        "max_tokens": max_tokens(args.task, args.preset),
        "prompts_cut": cut_prompts(args, samples, chat),
        "units": UNITS, "lm_eval": lm_eval.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        # The ends of a few prompts, and their answers, for a person to read.
        "samples": [
            {"prompt_end": s["arguments"][0][0][-300:], "answer": s["resps"][0][0],
             "want": s["target"]}
            for s in samples[: args.keep]
        ],
    }  # fmt: skip


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Render the report as a short text."""
    scores = ", ".join(f"{name} {100 * value:.1f} %" for name, value in report["score"].items())
    lines = [
        *record.head(f"{report['model']} on {report['task']}", report),
        f"**{scores}** on {report['problems']} of {report['of']} problems,",
        f"{report['shots']} shots, {report['max_tokens']} tokens, through {report['through']},",
        f"{report['seconds']:.0f} s.",
        f"D2F settings: {report['preset'] or 'its own'}.",
    ]
    if cut := report["prompts_cut"]:
        lines += [
            "",
            f"**{cut} of {report['problems']} prompts lost their beginning**: prompt and answer",
            "need more positions than there are, so this is not the published task. Use a model",
            "with more, or a larger --max-model-len if one was given.",
        ]
    return lines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = record.Parser("evaluate", __doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="arithmetic")
    add("--model", default="d2f-tiny", help="embedded name, folder or Hub id")
    add("--preset", choices=list(PRESETS), help="published D2F settings")
    add("--data", help="folder with the task's files; else the Hub is asked")
    add("--limit", type=int, help="only the first N problems")
    add("--server", help="address of a running vllm serve")
    add("--allow-code-execution", action="store_true", help="needed for programs")
    add("--chat", action="store_true", help="apply the model's chat template")
    add("--batch-size", type=int, default=32, help="requests at once")
    add("--max-model-len", type=int)
    add("--keep", type=int, default=5, help="answers kept in the result")
    args = parser.finish(argv, {}, ("batch_size",))
    if args.quick:
        args.limit = min(args.limit or 8, 8)
    return args


def evaluate(run: Record) -> None:
    """Ask and grade all problems, and report."""
    run.write(run.report(**run.point("scores", lambda: scores(run.args))))


main = record.command(parse, evaluate, markdown)

if __name__ == "__main__":
    sys.exit(main())
