# SPDX-License-Identifier: Apache-2.0
"""Answer many prompts without a server.

    python examples/offline.py [--model d2f-tiny] [--prompts FILE] [--out FILE]

The input has one prompt per line, and the output one JSON object per line. Pass all prompts in one
call: vLLM forms the batches.
"""

import argparse
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

PROMPTS = [
    "Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?",
    "Mia has 12 cups, buys 30 more. How many cups does Mia have?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer many prompts without a server.")
    parser.add_argument("--model", default="d2f-tiny", help="name, folder or Hub id")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the terminal")
    options = parser.parse_args()
    if options.out and options.out.exists():
        parser.error(f"{options.out} exists; name another file")
    prompts = options.prompts.read_text().splitlines() if options.prompts else PROMPTS

    # These options suit the tiny model on a CPU. A 7B model on a GPU needs none of them.
    llm = LLM(options.model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 27)
    sampling = SamplingParams(temperature=0, max_tokens=64, extra_args={"d2f_tau_conf": 0.95})
    outputs = llm.generate(prompts, sampling)
    lines = [
        json.dumps({"prompt": output.prompt, "answer": output.outputs[0].text})
        for output in outputs
    ]
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
