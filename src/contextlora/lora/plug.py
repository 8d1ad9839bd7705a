"""Tasks into and out of trained adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from contextlora.errors import AdapterError, did_you_mean
from contextlora.graph import Task
from contextlora.lora.adapter import Adapter, same_layers
from contextlora.lora.export import Block, block_hash
from contextlora.lora.folder import MANIFEST
from contextlora.lora.record import Record


def plug(folder: str | Path, source: str | Path, task: str | None = None) -> Adapter:
    """Adds a task of another adapter folder to this one, with its edges to the tasks that are here.

    Args:
        folder: the adapter folder to change.
        source: the adapter folder to take from, or one of the folders in its `tasks/`.
        task: which of its tasks; None for the only one that is not here yet.

    Returns:
        The adapter as saved.

    Raises:
        AdapterError: E314, E315 if base model or layers differ, E316 if the task is here already or not there.
    """
    source = Path(source)
    if task is None and not (source / MANIFEST).exists() and source.parent.name == "tasks":
        source, task = source.parent.parent, source.name
    here, there = Adapter.load(folder), Adapter.load(source)
    new = [t for t in there.blocks if t not in here.blocks]
    if task is None and len(new) != 1:
        raise AdapterError("E316", f"name the task to plug in; new there: {', '.join(new) or 'none'}", where=source)
    task = task or new[0]
    if task in here.blocks:
        raise AdapterError("E316", f"task '{task}' is here already; drop it first", where=folder)
    if task not in there.blocks:
        raise AdapterError("E316", f"no trained task '{task}'.{did_you_mean(task, there.blocks)}", where=source)
    adapter = compose(here, there.subset([task]))
    adapter.save(folder)
    return adapter


def drop(folder: str | Path, task: str) -> Adapter:
    """Removes a task from an adapter folder, graph.yaml included: see `Adapter.without`. Returns what was saved."""
    adapter = Adapter.load(folder).without(task)
    adapter.save(folder)
    return adapter


def compose(*adapters: Adapter) -> Adapter:
    """Several adapters of one base model as one: all their tasks, edges and blocks, none of them changed.

    Edges to tasks that one adapter lacked come back when another one brings them, if the block was trained with them.

    Raises:
        AdapterError: E314, E315 if base model or layers differ, E316 if two of them hold different tasks of one name.
    """
    if not adapters:
        raise AdapterError("E316", "nothing to compose; name at least one adapter")
    first = adapters[0]
    tasks: dict[str, Task] = {}
    blocks: dict[str, Block] = {}
    records: dict[str, Record] = {}
    for a in adapters:
        _same_base(first, a)
        for name in a.graph.names:
            task = _explicit(a, name, first.graph.rank)
            if name in tasks:
                task = _united(name, tasks[name], task)
            if name in blocks and name in a.blocks and block_hash(blocks[name]) != block_hash(a.blocks[name]):
                raise AdapterError(
                    "E316", f"two adapters hold different blocks of task '{name}'; drop one", where=a.graph.name
                )
            tasks[name] = task
            if name in a.blocks:
                blocks[name] = a.blocks[name]
            if name in a.records and (name in a.blocks or name not in records):
                records[name] = a.records[name]
    known = {n: tuple(p for p in dict.fromkeys(t.after) if p in tasks) for n, t in tasks.items()}
    tasks = {n: t.model_copy(update={"after": known[n]}) for n, t in tasks.items()}
    return replace(first, graph=replace(first.graph, tasks=tasks), blocks=blocks, records=records)


def _explicit(adapter: Adapter, name: str, default_rank: int) -> Task:
    """A task that means the same under another default rank, and still names prerequisites that its graph lacks."""
    task = adapter.graph.task(name)
    record = adapter.records.get(name)
    lost = [p for p in record.prerequisites if p not in adapter.graph.tasks] if record else []
    rank = adapter.graph.rank_of(name)
    return task.model_copy(update={"after": (*task.after, *lost), "rank": None if rank == default_rank else rank})


def _united(name: str, one: Task, other: Task) -> Task:
    """Two definitions of one task with the edges of both. Raises AdapterError E316 if they differ in more."""
    for key in ("question", "options", "choose", "rank", "alpha"):
        if getattr(one, key) != getattr(other, key):
            raise AdapterError("E316", f"two adapters define task '{name}' with different {key}", where=name)
    return one.model_copy(update={"after": (*one.after, *other.after)})


def _same_base(one: Adapter, other: Adapter) -> None:
    key = "fingerprint" if one.fingerprint and other.fingerprint else "base"
    if getattr(one, key) != getattr(other, key):
        raise AdapterError(
            "E314",
            f"one adapter was trained on the base '{one.base}' {one.fingerprint[:23]}, "
            f"the other on '{other.base}' {other.fingerprint[:23]}; they need the same",
            where=other.graph.name,
        )
    if one.graph.prerequisite_rule != other.graph.prerequisite_rule:
        raise AdapterError("E316", "one graph has `prerequisites: all`, the other not", where=other.graph.name)
    same_layers(one.layers, other.layers)
