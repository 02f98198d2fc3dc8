# SPDX-License-Identifier: Apache-2.0
"""Ask a running server for whole answers and for a stream.

    vllm serve --config examples/serve.yaml
    python examples/client.py [--url http://localhost:8000/v1]

`vllm_xargs` carries the D2F settings of one request. This example asks the same question with a
high and with a low confidence threshold.
"""

import argparse

import openai

QUESTION = "Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a running server.")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="base URL of the API")
    parser.add_argument("question", nargs="?", default=QUESTION)
    options = parser.parse_args()

    client = openai.OpenAI(base_url=options.url, api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": options.question}]
    for tau_conf in (0.99, 0.5):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=64,
            extra_body={"vllm_xargs": {"d2f_tau_conf": tau_conf}},
        )
        tokens = answer.usage.completion_tokens
        print(f"tau_conf {tau_conf}: {answer.choices[0].message.content} ({tokens} tokens)")

    # Each piece holds the tokens that one forward pass made available to the client.
    print("streamed:", end="", flush=True)
    for event in client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, stream=True
    ):
        if event.choices and (piece := event.choices[0].delta.content):
            print(f" [{piece}]", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
