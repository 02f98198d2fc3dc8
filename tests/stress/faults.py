# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a server's process with requests in flight, and of a training while it saves.

Nothing is a mock: real processes, files and signals. The same of a merge, and a disk that fills up,
are in tests/hub/test_prepare.py.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from stress.server import child

PROMPT = "Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?"
COMPLETIONS = "/v1/completions"
SLOW = {
    # One token per forward, and it never ends: hundreds of forwards for each answer.
    "max_tokens": 400,
    "ignore_eos": True,
    "vllm_xargs": {"d2f_tau_conf": 1.0, "d2f_block_size": 4, "d2f_max_blocks": 1},
}


def kill_under_load(
    url: str, process: Any, title: str, clients: int, prompt: str = PROMPT, headers: Any = None
) -> dict[str, Any]:
    """Kill a process of a server while requests run, half of them streamed.

    Args:
        process: the server's own; `title` is that of its process to kill.

    Returns:
        What each client met, how long it took, and the server's exit status.
    """
    met: list[str] = []
    answered = [0] * clients

    def ask(stream: bool) -> str:
        """Ask once. Return the error that the client meets, or nothing."""
        body = {"model": "d2f-tiny", "prompt": prompt, "temperature": 0, "stream": stream} | SLOW
        try:
            response = httpx.post(f"{url}{COMPLETIONS}", json=body, headers=headers, timeout=600)
        except httpx.HTTPError as error:
            return type(error).__name__
        if response.status_code != 200:
            return f"HTTP {response.status_code}"
        whole = not stream or ("[DONE]" in response.text and '"error"' not in response.text)
        return "" if whole else "broken stream"

    def client(which: int) -> None:
        """Ask again and again, so that every client waits for an answer at any moment."""
        while not (error := ask(stream=which % 2 == 0)):
            answered[which] += 1
        met.append(error)

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(clients)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 300
    while not all(answered) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    os.kill(child(process.pid, title), signal.SIGKILL)
    for thread in threads:
        thread.join(240)
    clients_seconds = time.monotonic() - started
    status = process.wait(300)
    return {
        "in_flight": clients,
        "clients_answered_before": sum(map(bool, answered)),
        "clients": {what: met.count(what) for what in sorted(set(met))},
        "clients_hanging": clients - len(met),
        "last_client_seconds": round(clients_seconds, 1),
        "status": status,
        "seconds_to_the_end": round(time.monotonic() - started, 1),
    }


def failures(report: dict[str, Any], log: str) -> list[str]:
    """Describe what is wrong after a kill: a supervisor must see status 1, each client an error."""
    found = {
        "a client was not answered before": report["clients_answered_before"] < report["in_flight"],
        "a client hangs": report["clients_hanging"],
        f"exit status {report['status']}": report["status"] != 1,
        "the log does not say that the engine died": "The engine died, see the first error above"
        not in log,
    }
    return [what for what, happened in found.items() if happened]


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
        """Check every number, and return the step from which a new process would continue."""
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
    duration = _fastest(lambda: save_some(0))
    rng = random.Random(2)
    counts = dict(interrupted=0, left_parts=0, between_renames=0, whole=0, corrupt=0, late=0)
    step = 2
    while counts["interrupted"] < kills and not counts["corrupt"]:
        if rng.random() < 0.1:
            shutil.rmtree(folder)
            folder.mkdir()
            step = -1
        pid = _fork(lambda: save_some(step + 1))  # noqa: B023, it is gone by the next turn
        time.sleep(rng.random() * duration * 1.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        counts["left_parts"] += (folder / ".checkpoint.part").exists()
        # Between its two renames only the old one is there.
        renaming = (folder / ".checkpoint.old").exists() and not (folder / "checkpoint").exists()
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


def _fork(work: Callable[[], object]) -> int:
    """Run `work` in a child that has imported everything already. Return its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def _fastest(work: Callable[[], object], runs: int = 3) -> float:
    """Return the seconds of the fastest run, so that a slow one puts no kill past the end."""
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        assert os.waitpid(_fork(work), 0)[1] == 0, "the work fails though it is not killed"
        best = min(best, time.perf_counter() - started)
    return best
