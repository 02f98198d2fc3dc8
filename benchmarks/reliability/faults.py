# SPDX-License-Identifier: Apache-2.0
"""Faults: what is left, what is said and how it starts again.

    python -m benchmarks.reliability.faults --json benchmarks/results/reliability_faults.json
    python -m benchmarks.reliability.faults --only merge checkpoint --kills 100

`merge`: kill -9 at random moments of a merge. `checkpoint`: the same of a training's checkpoint.
`disk`: a disk that fills up while a model is prepared. `engine` and `worker`: kill -9 of these
processes of `vllm serve` with requests in flight. Nothing is a mock: real processes, files and
signals.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving_server import VLLM, free_port

# Before torch is imported: a forked child of a process with more threads may wait for ever, and on
# a busy machine a server with more threads than cores waits too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = "d2f-tiny"
PROMPT = "Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?"
IN_FLIGHT = 8
"""Requests that run when a server's process is killed; half of them are streamed."""


# ---- kill -9 while files are written -------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child that has everything imported already; its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def kill_after(child: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def fastest(work: Callable[[], object], runs: int = 3) -> float:
    """Seconds of the fastest run: a pause of the machine must not put all kills past the end."""
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        if os.waitpid(fork(work), 0)[1] != 0:
            raise RuntimeError("the work fails even if nobody kills it")
        best = min(best, time.perf_counter() - started)
    return best


def kill_merges(kills: int, folder: Path) -> dict[str, Any]:
    """Kill a merge `kills` times while it runs; whatever is in its place must be whole."""
    from vllm_d2f.hub import cache
    from vllm_d2f.hub.prepare import MergePlan, merge

    base, adapter = write_pair(folder)
    own = MergePlan(str(base), str(adapter), d2f={"block_size": 8, "max_blocks": 2})
    out = folder / "merged"

    def work() -> None:
        merge(out, own, force=True)

    duration = fastest(work)
    expected = {f.name: cache.sha256_of(f) for f in out.glob("*.safetensors")}
    rng = random.Random(1)
    counts = dict(interrupted=0, left_parts=0, absent=0, whole=0, corrupt=0, late=0)
    while counts["interrupted"] < kills:
        if rng.random() < 0.5 and out.exists():
            cache.remove_folder(out)  # with nothing in its place a half would show
        before = out.stat().st_ino if out.exists() else None
        child = fork(work)
        kill_after(child, rng.random() * duration * 1.1)
        after = out.stat().st_ino if out.exists() else None
        if after is not None and after != before:
            counts["late"] += 1  # the merge was complete
        else:
            counts["interrupted"] += 1
        counts["left_parts"] += bool(cache.parts_of(out))
        state = cache.inspect(out)
        if state.kind == "absent":
            counts["absent"] += 1
        elif state.kind == "ready" and not cache.damaged_files(out, state):
            counts["whole"] += 1
        else:
            counts["corrupt"] += 1
    work()  # a clean restart: what was left goes, and the result is the same
    again = {f.name: cache.sha256_of(f) for f in out.glob("*.safetensors")}
    return counts | {
        "merge_seconds": round(duration, 3),
        "restart_gives_the_same_files": again == expected,
        "parts_after_restart": len(cache.parts_of(out)),
    }


def write_pair(folder: Path) -> tuple[Path, Path]:
    """A base of some 40 MB in three files and an adapter for it, both random."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from checkpoints import write_dream
    from safetensors.torch import save_file

    base = write_dream(
        folder / "Dream-v0-Base-7B", hidden=256, layers=8, intermediate=1024, heads=8, shards=3
    )
    import torch

    adapter = folder / "adapter"
    adapter.mkdir()
    torch.manual_seed(0)
    weights = {}
    for layer in range(8):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{stem}.lora_A.weight"] = torch.randn(4, 256)
        weights[f"{stem}.lora_B.weight"] = torch.randn(256, 4)
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def kill_checkpoints(kills: int, folder: Path) -> dict[str, Any]:
    """Kill a training's `checkpoint.save` `kills` times; what `find` finds must load and agree.

    Every number in a checkpoint is its step: a mixture of two would show.
    """
    import torch
    from accelerate import Accelerator

    from training import checkpoint

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(600, 600)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)

    def fill(step: int) -> None:
        for parameter in model.parameters():
            parameter.data.fill_(step)
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][name] = torch.full_like(parameter, step)
            optimizer.state[parameter]["step"] = torch.tensor(float(step))

    def save_some(first: int) -> None:
        for step in range(first, first + 3):
            fill(step)
            checkpoint.save(accelerator, folder, {"step": step})

    def loaded() -> int | None:
        """The step that a new process would go on from, after a check of every number."""
        found = checkpoint.find(folder)
        if found is None:
            return None
        step = checkpoint.progress_of(found)["step"]
        fill(-1)
        accelerator.load_state(str(found))
        state = [value for group in optimizer.state.values() for value in group.values()]
        for value in (*model.parameters(), *state):
            if not bool((value == step).all()):
                raise ValueError(f"{found} says step {step} and holds another one")
        return step

    fill(0)
    duration = fastest(lambda: save_some(0))
    rng = random.Random(2)
    counts = dict(interrupted=0, left_parts=0, between_renames=0, whole=0, corrupt=0, late=0)
    step = 2
    while counts["interrupted"] < kills:
        if rng.random() < 0.1:
            shutil.rmtree(folder)
            folder.mkdir()
            step = -1
        child = fork(lambda: save_some(step + 1))  # noqa: B023, the child is gone by the next turn
        kill_after(child, rng.random() * duration * 1.1)
        counts["left_parts"] += (folder / "checkpoint.part").exists()
        # Between its two renames only the old one is there.
        renaming = (folder / "checkpoint.old").exists() and not (folder / "checkpoint").exists()
        counts["between_renames"] += renaming
        try:
            found = loaded()
        except Exception as error:
            counts["corrupt"] += 1
            print(f"corrupt: {error}", file=sys.stderr)
            continue
        if found is not None and not step <= found <= step + 3:
            counts["corrupt"] += 1  # it went back behind what was already there
        counts["whole"] += found is not None
        counts["late" if found == step + 3 else "interrupted"] += 1
        step = -1 if found is None else found
    save_some(step + 1)
    return counts | {
        "three_checkpoints_seconds": round(duration, 3),
        "restart_goes_on": loaded() == step + 3,
        "parts_after_restart": sorted(p.name for p in folder.iterdir()) != ["checkpoint"],
    }


# ---- a full disk ---------------------------------------------------------------------------------


def fill_disk(folder: Path) -> dict[str, Any]:
    """`python -m vllm_d2f merge` where no file may grow beyond what a full disk leaves."""
    base, adapter = write_pair(folder)
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    out = folder / "out" / "merged"
    command = [sys.executable, "-m", "vllm_d2f", "merge", "--base", str(base)]
    command += ["--adapter", str(adapter), "--out", str(out)]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 4096,) * 2)

    full = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=600)
    left = sorted(path.name for path in out.parent.rglob("*") if not path.name.endswith(".lock"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return {
        "status": full.returncode,
        "message": full.stderr.strip().splitlines()[-1].replace(str(folder), "FOLDER"),
        "left_behind": left,
        "status_with_space": again.returncode,
    }


# ---- a server whose process is killed ------------------------------------------------------------


class Server:
    """A `vllm serve` process whose log is kept."""

    def __init__(self, log: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [str(VLLM), "serve", MODEL, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
        command += ["--kv-cache-memory-bytes", str(1 << 27), *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            time.sleep(0.5)
        raise RuntimeError(f"no server. Its log ends:\n{self.log.read_text()[-3000:]}")

    def child(self, name: str) -> int:
        """The process id of the server's engine or worker, by vLLM's title for it."""
        import psutil

        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [c.pid for c in children if name in " ".join(c.cmdline())]
        if len(found) != 1:
            raise RuntimeError(f"{len(found)} processes called {name}")
        return found[0]

    def ask(self, **options: Any) -> str:
        """The answer's text, or what the client meets instead: an error of any kind."""
        body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 48} | options
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text = response.read().decode()
        if options.get("stream"):
            if '"error"' in text or "[DONE]" not in text:
                raise OSError(f"the stream broke off: {text[-200:]}")
            return text
        return json.loads(text)["choices"][0]["text"]

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def server(log: Path, *options: str, seconds: float = 600) -> Iterator[Server]:
    started = Server(log, *options)
    try:
        started.ready(seconds)
        yield started
    finally:
        started.stop()


SLOW = {
    # One token per forward, and it never ends: hundreds of forwards for each answer.
    "max_tokens": 400,
    "ignore_eos": True,
    "vllm_xargs": {"d2f_tau_conf": 1.0, "d2f_block_size": 4, "d2f_max_blocks": 1},
}


def kill_process(title: str, folder: Path, *options: str, restart: bool = True) -> dict[str, Any]:
    """Kill a server's process while requests run: what clients, the log and the shell see."""
    log = folder / "first.log"
    with server(log, *options) as running:
        before = running.ask()
        met: list[str] = []
        answered = [0] * IN_FLIGHT

        def client(which: int) -> None:
            """Ask again and again, so that every client waits for an answer at any moment."""
            try:
                while True:
                    running.ask(stream=which % 2 == 0, **SLOW)
                    answered[which] += 1
            except urllib.error.HTTPError as error:
                met.append(f"HTTP {error.code}")
            except (OSError, ValueError) as error:
                met.append(type(error).__name__)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(IN_FLIGHT)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 300
        while not all(answered) and time.monotonic() < deadline:
            time.sleep(0.05)
        started = time.monotonic()
        os.kill(running.child(title), signal.SIGKILL)
        for thread in threads:
            thread.join(240)
        clients_seconds = time.monotonic() - started
        status = running.process.wait(300)
        seconds = time.monotonic() - started
    said = [line for line in log.read_text().splitlines() if "rror" in line or "died" in line]
    result = {
        "in_flight": IN_FLIGHT,
        "answered_before": sum(answered),
        "clients": {what: met.count(what) for what in sorted(set(met))},
        "clients_hanging": IN_FLIGHT - len(met),
        "last_client_seconds": round(clients_seconds, 1),
        "status": status,
        "seconds_to_the_end": round(seconds, 1),
        "log": [line.split("] ", 1)[-1][:200] for line in said if "EngineDead" in line][-2:],
    }
    if restart:
        with server(folder / "second.log", *options) as again:
            result["restart_answers_the_same"] = again.ask() == before
    return result


FAULTS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "merge": kill_merges,
    "checkpoint": kill_checkpoints,
    "disk": lambda kills, folder: fill_disk(folder),
    "engine": lambda kills, folder: kill_process("EngineCore", folder),
    "worker": lambda kills, folder: kill_process(
        "Worker", folder, "--distributed-executor-backend", "mp"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--kills", type=int, default=100, help="of the merge and the checkpoint")
    parser.add_argument("--json", type=Path, help="results; what is in the file already is kept")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if args.json and args.json.exists():
        results = json.loads(args.json.read_text())
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = FAULTS[name](args.kills, Path(folder))
        print(name, json.dumps(results[name], indent=1), flush=True)
        results["machine"] = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores"
        results["python"] = platform.python_version()
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
