"""Watching a run: a progress bar, metrics.jsonl always, TensorBoard and W&B by option."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from contextlora.errors import RunError


class Tracker:
    """Writes one JSON line an update to `folder`/metrics.jsonl and shows progress on the terminal.

    Args:
        folder: the run's folder.
        trackers: further sinks, "tensorboard" or "wandb".
        quiet: no progress bar.
    """

    def __init__(self, folder: Path, trackers: tuple[str, ...] = (), quiet: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _open_whole(folder / "metrics.jsonl")
        self._sinks = [_sink(name, folder) for name in trackers]
        self._bar = _bar(quiet)
        self._row: Any = None

    def __enter__(self) -> Tracker:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Starts a new bar."""
        self._row = self._bar.add_task(name, total=total, completed=done, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Moves the bar to `done`."""
        self._bar.update(self._row, completed=done, note=note)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Records one update's numbers."""
        record = {"time": round(time.time(), 3), "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.log(step, values)


@contextmanager
def counting(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars for work that is only counted: call what it gives with (what, done, total)."""
    rows: dict[str, Any] = {}
    with _bar(quiet) as bar:

        def count(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what, total=total, note="")
            bar.update(rows[what], completed=done)

        yield count


def _bar(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )


def _open_whole(path: Path) -> TextIO:
    """Opens `path` for appending lines, on a new one if a kill cut the last line short."""
    file = path.open("a+b")
    if file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
        file.write(b"\n")
    file.close()
    return path.open("a", encoding="utf-8")


class _TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call, unused-ignore]

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call, unused-ignore]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call, unused-ignore]


class _WandB:
    def __init__(self, folder: Path):
        import wandb  # type: ignore[import-not-found, unused-ignore]

        self._run = wandb.init(project="contextlora", dir=str(folder))

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({**_numbers(values), "update": step})  # W&B drops steps that go back, as every stage's do

    def close(self) -> None:
        self._run.finish()


def _sink(name: str, folder: Path) -> _TensorBoard | _WandB:
    try:
        return _TensorBoard(folder) if name == "tensorboard" else _WandB(folder)
    except ImportError:
        raise RunError("E512", f"tracker '{name}' needs `pip install {name}`") from None


def _numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as flat names, e.g. loss/weather."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat
