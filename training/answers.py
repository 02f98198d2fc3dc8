# SPDX-License-Identifier: Apache-2.0
"""The autoregressive model's greedy answers as training data (`teacher: greedy`).

People leave choices open that one model makes alike every time. A student that decodes several
positions at once cannot know which choice its neighbours make, so it learns from the model's.

Shapes: B prompts, T tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from training.data import Example, Records
from training.report import read_lines
from vllm_d2f.output import write_at_once

CHUNK = 32


def greedy_answers(
    records: Records,
    net: Any,
    ends: Sequence[int],
    max_length: int,
    file: Path,
    accelerator: Accelerator,
) -> Records:
    """Return the records with the model's answers instead of their own.

    They are kept in `file`, with which an interrupted run continues. Answers that are longer than
    `max_length` with their prompt, or much longer than the record's own, are left out.
    """
    with accelerator.main_process_first():
        kept = read_lines(file) if file.exists() else []
        if accelerator.is_main_process:  # drop a last line that an interruption cut off
            write_at_once(file, "".join(json.dumps(entry) + "\n" for entry in kept))
        order = sorted(range(len(records.all)), key=lambda i: -len(records.all[i].prompt))
        todo = order[len(kept) :] if accelerator.is_main_process else []
        net.to(accelerator.device).eval()
        for at in range(0, len(todo), CHUNK):
            chunk = [records.all[i] for i in todo[at : at + CHUNK]]
            found = generate(net, chunk, ends, max_length)
            with file.open("a") as out:
                for i, answer in zip(todo[at : at + CHUNK], found, strict=True):
                    kept.append({"record": i, "answer": answer})
                    out.write(json.dumps(kept[-1]) + "\n")
        net.train()
    whole = [
        replace(records.all[entry["record"]], answer=tuple(entry["answer"]), ended=True)
        for entry in sorted(kept, key=lambda entry: entry["record"])
        if entry["answer"] is not None
    ]
    if not whole:
        raise ValueError(f"{file}: none of the model's answers ends; train it for longer")
    counts = {**records.counts, "answers without an end": len(kept) - len(whole)}
    return replace(records, all=whole, counts=counts)


@torch.inference_mode()
def generate(
    net: Any, examples: Sequence[Example], ends: Sequence[int], max_length: int
) -> list[list[int] | None]:
    """Generate greedy answers without their end token; None for one that did not end."""
    width = max(len(example.prompt) for example in examples)
    ids_BT = torch.full((len(examples), width), ends[0])
    for row_T, example in zip(ids_BT, examples, strict=True):
        row_T[width - len(example.prompt) :] = torch.tensor(example.prompt)
    longest = max(len(example.answer) for example in examples)
    lengths_B1 = torch.tensor([[len(example.prompt)] for example in examples])
    seen_BT = torch.arange(width) >= width - lengths_B1
    out_BT = net.generate(
        input_ids=ids_BT.to(net.device),
        attention_mask=seen_BT.long().to(net.device),
        max_new_tokens=min(longest + CHUNK, max_length - width),
        do_sample=False,
        use_cache=True,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    answers = []
    for row in out_BT[:, width:].tolist():
        end = next((at for at, token in enumerate(row) if token in ends), None)
        answers.append(None if end is None else row[:end])
    return answers
