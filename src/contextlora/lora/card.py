"""The model card of an adapter folder: README.md beside the graph's picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from contextlora.graph import TaskGraph

_CARD = """---
base_model: {base_json}
library_name: peft
tags: [lora, contextlora]
---
# {name}

A ContextLoRA adapter of [{base}]: {count} tasks, each with a block of its own, on {layers} linear layers.

![the task graph](graph.svg)

| task | comes after | rank | alpha | trained on | seed | metrics | block |
|---|---|---|---|---|---|---|---|
{rows}
{notes}
Base fingerprint: `{fingerprint}`. Trained with: {versions}.

Each folder in `tasks/` is a plain PEFT LoRA of that task's own block. A task needs the blocks of the tasks it comes
after as well: `contextlora export` writes them together as one plain LoRA. `graph.yaml` may be edited to add or change
tasks; everything else is checked by `manifest.json`.
"""


def card(
    graph: TaskGraph,
    records: Mapping[str, Mapping[str, Any]],
    *,
    base: str,
    fingerprint: str,
    layers: int,
    stale: Mapping[str, str],
) -> str:
    """The text of README.md.

    Args:
        graph: the tasks.
        records: what is known of each trained task: data, seed, metrics, sha256, versions.
        base: name of the base model.
        fingerprint: of the base model; may be empty.
        layers: how many linear layers carry blocks.
        stale: tasks that should be trained (again), and why.
    """
    notes = "".join(f"- **{_cell(task)}**: {_cell(why)}\n" for task, why in stale.items())
    versions = {f"{k} {v}" for r in records.values() for k, v in r["versions"].items()}
    return _CARD.format(
        base=_cell(base or "unnamed base"),
        base_json=json.dumps(base),
        name=_cell(graph.name),
        count=len(graph.names),
        layers=layers,
        rows="\n".join(_row(graph, t, records.get(t)) for t in graph.names),
        notes=f"\nTo be trained:\n\n{notes}" if notes else "",
        fingerprint=fingerprint or "unknown",
        versions=", ".join(sorted(versions)) or "nothing yet",
    )


def _row(graph: TaskGraph, task: str, record: Mapping[str, Any] | None) -> str:
    rank = graph.rank_of(task)
    cells: Iterable[Any] = (task, ", ".join(graph.prerequisites(task)), rank, f"{graph.scale_of(task) * rank:g}")
    if record is None:
        return _line(*cells, "", "", "", "")
    metrics = ", ".join(f"{k} {v:.4g}" for k, v in record["metrics"].items())
    return _line(*cells, record["data"][:16], record["seed"], metrics, record["sha256"][:16])


def _line(*cells: Any) -> str:
    return f"| {' | '.join(_cell(c) for c in cells)} |"


def _cell(value: Any) -> str:
    """Text that stays text: it cannot end a table cell, a line or a link, nor open a tag."""
    return str(value).translate(_PLAIN)


_PLAIN = {ord(c): to for c, to in (("\\", "/"), ("|", "/"), ("\n", " "), ("[", "("), ("]", ")"), ("<", "&lt;"))}
