"""The folder of a comparison: results, claims and what jobs share. Any number of processes may work in it at once.

results/<id>.json    one for each finished job, written whole or not at all
claims/<name>        files that are only ever locked; the system lets go of them when a process dies
data/, bases/        drawn pictures and aligned projectors, made once
features/            what the language model sees of each picture, by base
work/<id>/           checkpoints of a job in the middle, removed when its result is written
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contextlora.errors import RunError
from contextlora.reports.jobs import FORMAT

KEYS = {"format", "id", "job", "graph", "scores", "mean", "cost", "made"}


class Store:
    """Paths, results and locks of a comparison's folder.

    Args:
        folder: made if it is missing.

    Raises:
        RunError: E523 if it cannot be written, E526 if a result in it is of another format.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.results, self.claims = self.path / "results", self.path / "claims"
        self._known: dict[str, dict[str, Any]] = {}
        try:
            for made in (self.results, self.claims):
                made.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError("E523", f"cannot be written: {e.strerror}", where=self.path) from None
        for path in sorted(self.results.glob("*.json")):
            self.result(path.stem)

    def work(self, name: str) -> Path:
        """Where a job in the middle keeps its checkpoints."""
        return self.path / "work" / name

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a job; None if it is not done, or its file was cut short. Raises RunError E526."""
        if name in self._known:
            return self._known[name]
        path = self.results / f"{name}.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            text = f"a result of format {data['format']!r}, and this version writes {FORMAT}; delete it, or give --out"
            raise RunError("E526", f"{text} another folder", where=path)
        if not isinstance(data, dict) or not data.keys() >= KEYS:
            return None
        self._known[name] = data
        return data

    def write(self, name: str, result: dict[str, Any]) -> None:
        """Keeps a result, whole or not at all, whatever moment the process dies at."""
        write_whole(self.results / f"{name}.json", json.dumps(result, ensure_ascii=False, allow_nan=False))

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether a job is ours while the block runs: False if another process has it."""
        with (self.claims / name).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def begun(self, name: str) -> None:
        """Notes in a claimed job's file that this process begins it: who worked on what, should anyone wonder."""
        with (self.claims / name).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Waits until no other process is inside the same lock."""
        with (self.claims / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that it is there complete or not at all. Raises RunError E523."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as e:
        raise RunError("E523", f"cannot be written: {e.strerror}", where=path) from None


def read_number(path: Path) -> float:
    """The number that a small file holds; 0 without one."""
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0
