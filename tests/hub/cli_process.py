# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_d2f ARGUMENTS` many times, with the imports paid for once.

Run as a program it reads one JSON request per line, forks, and runs the command in the child with
the request's environment. huggingface_hub reads its environment when it is imported; what a request
changes of that is set in the child.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from typing import Any


class CommandProcess:
    """Starts the program; `run` gives a command's exit status and all it printed."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Other tests may have switched progress bars off for this process.
            env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "0"} | environment,
        )

    def run(self, arguments: list[str], **request: Any) -> tuple[int, str]:
        assert self.process.stdin and self.process.stdout
        with tempfile.NamedTemporaryFile("r") as output:
            request |= {"arguments": arguments, "output": output.name}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            return status, output.read()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def serve() -> None:
    import huggingface_hub.constants
    import torch  # noqa: F401

    from vllm_d2f.__main__ import main
    from vllm_d2f.hub import download, prepare  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 70
            try:
                output = os.open(request["output"], os.O_WRONLY)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.environ.update(request["environment"])
                for name, value in request["constants"].items():
                    setattr(huggingface_hub.constants, name, value)
                status = main(request["arguments"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    serve()
