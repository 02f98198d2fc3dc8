# SPDX-License-Identifier: Apache-2.0
"""A stage's results in one small JSON file, written after every point.

A point is settled when it was measured, skipped with a reason, or failed. Before a point begins its
attempt is counted in the file, so a process that is killed in it leaves a trace, and a point that
ended its process `ATTEMPTS` times is given up.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ATTEMPTS = 2


class Mismatch(ValueError):
    """The file holds results of another device, version or size."""


class Store:
    """The points of one stage.

    The file has `stage`, `about` (device, versions, options), `points`, `skipped` and `failed`
    (reasons by key), `attempts` and `finished` (parts).
    """

    def __init__(self, path: Path, stage: str, about: Mapping[str, Any]) -> None:
        """Open or begin a file.

        Raises:
            Mismatch: it was begun on another device or with other options.
        """
        self.path = path
        self.data: dict[str, Any] = {
            "stage": stage,
            "about": dict(about),
            "points": {},
            "skipped": {},
            "failed": {},
            "attempts": {},
            "finished": [],
        }
        if path.exists():
            known = read(path)
            if other := [k for k, v in about.items() if known["about"].get(k) != v]:
                name = other[0]
                raise Mismatch(
                    f"{path.name} holds results with {name} = {known['about'].get(name)!r}, this "
                    f"run has {about[name]!r}; give another OUT, or delete the file"
                )
            self.data = known

    @property
    def points(self) -> dict[str, Any]:
        return self.data["points"]

    def settled(self, key: str) -> bool:
        """Whether nothing is left to do for a point; one that was given up becomes failed."""
        if any(key in self.data[kind] for kind in ("points", "skipped", "failed")):
            return True
        if self.data["attempts"].get(key, 0) < ATTEMPTS:
            return False
        self.fail(key, f"the process ended {ATTEMPTS} times in this point; see run.log")
        return True

    def begin(self, key: str) -> None:
        self.data["attempts"][key] = self.data["attempts"].get(key, 0) + 1
        self._write()

    def unfinished(self, key: str) -> None:
        """Take back an attempt that ended for want of time."""
        self.data["attempts"].pop(key, None)
        self._write()

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        self.points[key] = dict(value)
        self._settle(key)

    def skip(self, key: str, reason: str) -> None:
        self.data["skipped"][key] = reason
        self._settle(key)

    def fail(self, key: str, reason: str) -> None:
        self.data["failed"][key] = reason
        self._settle(key)

    def finished(self, part: str) -> bool:
        return part in self.data["finished"]

    def finish(self, part: str) -> None:
        if not self.finished(part):
            self.data["finished"].append(part)
        self._write()

    def retry_failed(self) -> None:
        """Forget failures, so that their points and parts are taken up again."""
        if self.data["failed"]:
            self.data["failed"], self.data["attempts"], self.data["finished"] = {}, {}, []
            self._write()

    def _settle(self, key: str) -> None:
        self.data["attempts"].pop(key, None)
        self._write()

    def _write(self) -> None:
        """Replace the file at once: a kill leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def read(path: Path) -> dict[str, Any]:
    """A stage's file.

    Raises:
        Mismatch: it is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for name in ("stage", "about", "points", "skipped", "failed", "attempts", "finished"):
            data[name]
    except (ValueError, KeyError, TypeError) as error:
        raise Mismatch(
            f"{path.name} is not a stage's file ({error!r}); delete it to begin again"
        ) from None
    return data
