# SPDX-License-Identifier: Apache-2.0
"""The job `chat`: a chat model writes prompts and answers them, as data for its D2F form.

    python -m training.chat --base HuggingFaceTB/SmolLM2-135M-Instruct --out build/chat-train.jsonl

A chat model that sees only the beginning of a user's turn goes on with a prompt (the method of
Magpie, arXiv 2406.08464). Its greedy answers to these prompts, and to questions of a file, are what
D2F learns to write several tokens at a time. An answer that has not ended after `--max-tokens` is
written as far as it goes; `data.max_length` below that keeps its end from being learnt.

Shapes: B prompts, T tokens.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.report import read_lines
from vllm_d2f.output import output_file

MARK = "\x00"
SHORTEST = 4
"""Words of a prompt; shorter ones are greetings and noise."""


@torch.inference_mode()
def continued(
    net: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, **options: Any
) -> list[tuple[str, bool]]:
    """Continue texts; return each continuation, and whether it ended by itself."""
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    out_BT = net.generate(
        **tokens, max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_token_id, **options
    )
    rows = out_BT[:, tokens.input_ids.shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [
        (tokenizer.decode(row[: row.index(end)] if end in row else row), end in row) for row in rows
    ]


def records(
    net: Any, tokenizer: Any, count: int, questions: Sequence[str], max_tokens: int, batch: int
) -> Iterator[dict[str, str]]:
    """Write prompts, and answer them and the questions."""
    turn = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, after = text.split(MARK)
    drawn = dict(do_sample=True, temperature=1.0, top_p=0.95, top_k=0)
    asked: dict[str, None] = {}
    for at in range(0, count, batch):
        begins = [before] * min(batch, count - at)
        for prompt, ended in continued(net, tokenizer, begins, 60, **drawn):
            line = prompt.strip()
            if ended and "\n" not in line and len(line.split()) >= SHORTEST:
                asked[line] = None
    prompts = [*asked, *questions]
    for at in range(0, len(prompts), batch):
        some = prompts[at : at + batch]
        found = continued(
            net, tokenizer, [before + prompt + after for prompt in some], max_tokens,
            do_sample=False,
        )  # fmt: skip
        for prompt, (answer, _) in zip(some, found, strict=True):
            yield {"prompt": prompt, "response": answer}


def main(argv: list[str] | None = None) -> None:
    """Write a JSONL file of prompts and responses that a chat model makes up."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", required=True, help="chat model: folder or Hub id")
    parser.add_argument("--out", type=output_file, required=True)
    parser.add_argument("--prompts", type=int, default=1300, help="prompts to draw")
    parser.add_argument("--questions", type=Path, help="JSONL whose `question` is answered as well")
    parser.add_argument("--num-questions", type=int, default=800, help="the first so many")
    parser.add_argument("--max-tokens", type=int, default=260)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    if not tokenizer.chat_template:
        parser.error(f"--base {args.base}: its tokenizer has no chat template")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    net = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).eval()
    lines = read_lines(args.questions)[: args.num_questions] if args.questions else []
    questions = [line["question"] for line in lines]
    with args.out.open("w", encoding="utf-8") as file:
        for record in records(
            net, tokenizer, args.prompts, questions, args.max_tokens, args.batch_size
        ):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
