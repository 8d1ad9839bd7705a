"""`contextlora export`, `plug` and `drop`: an adapter folder taken apart and put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contextlora.cli.app import app
from contextlora.cli.options import AdapterFolder, Base, Json
from contextlora.cli.shared import emit, task_names, tell_change
from contextlora.errors import ConfigError


@app.command()
def export(
    adapter: AdapterFolder,
    task: Annotated[str, typer.Option(help="One task: a plain PEFT LoRA. Several, by commas: an adapter folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    merged: Annotated[bool, typer.Option("--merged", help="The base model with this task merged in.")] = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write a task for use without contextlora.

    One task with its prerequisites becomes a plain PEFT LoRA, or with --merged a whole model.
    """
    from contextlora.lora.adapter import Adapter
    from contextlora.training.session import export_merged, find_adapter

    folder, names = find_adapter(adapter), task_names(task) or []
    loaded = Adapter.load(folder)
    for name in names:
        loaded.graph.task(name)
    if merged:
        if len(names) != 1:
            raise ConfigError("E108", "one task at a time can be merged", where="--task")
        written = export_merged(folder, names[0], out, base=base)
    else:
        written = loaded.export(names[0] if len(names) == 1 else names, out)
    kind = "model" if merged else "peft" if len(names) == 1 else "adapter"
    emit(as_json, {"out": str(written), "kind": kind, "tasks": names}, f"wrote {written}")


@app.command()
def plug(
    folder: AdapterFolder,
    source: Annotated[Path, typer.Argument(help="The adapter folder to take from, or one of its tasks/ folders.")],
    task: Annotated[str | None, typer.Option(help="Which task. Default: the only new one.")] = None,
    as_json: Json = False,
) -> None:
    """Add a task of another adapter to this one."""
    from contextlora.lora.plug import plug
    from contextlora.training.session import find_adapter

    home = find_adapter(folder)
    other = source if source.parent.name == "tasks" else find_adapter(source)
    tell_change(as_json, home, plug(home, other, task))


@app.command()
def drop(
    folder: AdapterFolder, task: Annotated[str, typer.Argument(help="The task to remove.")], as_json: Json = False
) -> None:
    """Remove a task from an adapter; the rest still answers."""
    from contextlora.lora.plug import drop
    from contextlora.training.session import find_adapter

    home = find_adapter(folder)
    tell_change(as_json, home, drop(home, task))
