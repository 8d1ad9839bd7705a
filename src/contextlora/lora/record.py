"""What is known of each block's training, and what of it no longer holds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field

from contextlora.graph import TaskGraph
from contextlora.lora.export import Block, block_hash
from contextlora.strict import Strict


class Record(Strict):
    """What is known of one trained block.

    Attributes:
        sha256: of the block.
        prerequisites: sha256 of each prerequisite's block that it was trained against.
        fingerprint: `TaskGraph.fingerprint` of the task as it was trained.
        trained_as: question, options, choose, rank and scale at that time.
        data: hash of the training data.
        seed: of the run.
        context: what its prompts said of the prerequisites in training (`TrainConfig.context`).
        metrics: numbers such as accuracy, by name.
        versions: of contextlora, torch and transformers.
    """

    sha256: str
    prerequisites: dict[str, str]
    fingerprint: str
    trained_as: dict[str, Any]
    data: str = ""
    seed: int = 0
    context: Literal["none", "gold", "predicted"] = "none"
    metrics: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


def records_of(
    graph: TaskGraph,
    blocks: Mapping[str, Block],
    known: Mapping[str, Record],
    data: str,
    seed: int,
    metrics: Mapping[str, Mapping[str, float]],
    context: str = "none",
) -> dict[str, Record]:
    """The record of every block: the known one while its bytes are the same, else a new one."""
    hashes = {t: block_hash(b) for t, b in blocks.items()}
    records = {t: r for t, r in known.items() if t in graph.tasks and t not in blocks}
    versions = {name: version(name) for name in ("contextlora", "torch", "transformers")}
    for task, sha in hashes.items():
        numbers = {k: float(v) for k, v in metrics.get(task, {}).items()}
        old = known.get(task)
        if old and old.sha256 == sha:
            records[task] = old.model_copy(update={"metrics": {**old.metrics, **numbers}})
            continue
        records[task] = Record(
            sha256=sha,
            prerequisites={p: hashes.get(p, "") for p in graph.prerequisites(task)},
            fingerprint=graph.fingerprint(task),
            trained_as=as_trained(graph, task),
            data=data,
            seed=seed,
            context=context,  # type: ignore[arg-type]
            metrics=numbers,
            versions=versions,
        )
    return records


def as_trained(graph: TaskGraph, task: str) -> dict[str, Any]:
    """What of a task's definition shapes its training, beside its prerequisites."""
    t = graph.task(task)
    options = None if t.options is None else list(t.options)
    return {
        "question": t.question,
        "options": options,
        "choose": t.choose,
        "rank": graph.rank_of(task),
        "scale": graph.scale_of(task),
    }


def fits(record: Record, graph: TaskGraph, task: str) -> bool:
    """Whether the block still has the rank and the scale that the graph says."""
    now = as_trained(graph, task)
    return all(record.trained_as.get(k) == now[k] for k in ("rank", "scale"))


def changes(record: Record, graph: TaskGraph, task: str) -> list[str]:
    """What about a task differs between its record and the graph."""
    if record.fingerprint == graph.fingerprint(task):
        return []
    changes = [k for k, v in as_trained(graph, task).items() if record.trained_as.get(k) != v]
    if set(record.prerequisites) != set(graph.prerequisites(task)):
        changes.append("prerequisites")
    return changes
