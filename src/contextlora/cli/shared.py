"""What commands share: reading what they are given, and telling what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from contextlora.errors import ConfigError

if TYPE_CHECKING:
    from contextlora.config import RunConfig


def load_run(path: Path, overrides: Sequence[str] | None) -> RunConfig:
    from contextlora.config import load

    path = path / "config.yaml" if path.is_dir() else path
    if path.is_file() and not path.read_bytes().strip():
        raise ConfigError("E102", "is empty; `contextlora init` writes one to start from", where=path)
    return load(path, overrides or ())


def is_config(path: Path) -> bool:
    """Whether `path` means a run rather than an adapter folder."""
    return not path.is_dir() or ((path / "config.yaml").is_file() and not (path / "manifest.json").is_file())


def task_names(tasks: str | None) -> list[str] | None:
    """Task names between commas. Raises ConfigError E105 for one that cannot be a name."""
    if tasks is None:
        return None
    names = [t.strip() for t in tasks.split(",")]
    for name in names:
        if not name or any(c.isspace() for c in name):
            raise ConfigError("E105", f"'{name}' is no task name; separate names by commas: a,b", where="tasks")
    return names


def whole_numbers(text: str, where: str) -> list[int]:
    """Whole numbers between commas. Raises ConfigError E108."""
    try:
        found = [int(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError("E108", f"'{text}' should be whole numbers between commas, e.g. 1,2,4", where=where)
    return sorted(set(found))


def tell_change(as_json: bool, folder: Path, adapter: Any) -> None:
    """Tells what an adapter folder holds after a change, and what of it should be trained again."""
    tasks = list(adapter.blocks)
    facts = {"adapter": str(folder), "tasks": tasks, "stale": tell_stale(adapter)}
    emit(as_json, facts, f"{folder} now holds {', '.join(tasks)}")


def tell_stale(adapter: Any) -> Mapping[str, str]:
    """The tasks that should be trained again and why, each with a warning."""
    stale: Mapping[str, str] = adapter.stale()
    for task, why in stale.items():
        warn(f"'{task}' should be trained (again): {why}")
    return stale


def emit(as_json: bool, data: Mapping[str, Any], text: str) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False) if as_json else text)


def say(text: str) -> None:
    typer.echo(text, err=True)


def warn(text: str) -> None:
    say(f"warning: {text}")


def show_accuracy(split: str, tasks: Mapping[str, Mapping[str, float]]) -> None:
    rows = [
        {
            "task": t,
            "accuracy": f"{a['mean']:.3f}",
            "95 %": f"{a['low']:.3f} to {a['high']:.3f}",
            "questions": a["count"],
        }
        for t, a in tasks.items()
    ]
    show_table(f"accuracy on split {split}", rows)


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(str(v)) for v in row.values()))
    console = Console()
    console.print(Text(title, style="bold"))
    console.print(table)
