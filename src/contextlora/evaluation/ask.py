"""One picture, one or all questions: what `contextlora ask` does, with whatever tasks an adapter holds."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contextlora.data.examples import Example
from contextlora.data.images import check_image
from contextlora.errors import AdapterError, ConfigError
from contextlora.evaluation.evaluate import Answers, Method, answer, context_for
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.models.inputs import ImageFeatures

ALL = "all"


@dataclass(frozen=True)
class Asked:
    """What a model answered.

    Attributes:
        answers: by task, in the graph's order; empty where it gave no valid answer.
        questions: as asked, by task.
        warnings: what is missing or out of date about the blocks that answered.
    """

    answers: dict[str, tuple[str, ...]]
    questions: dict[str, str]
    warnings: list[str]


def ask(
    reader: ImageFeatures,
    adapter: Adapter,
    *,
    image: str | Path | None = None,
    task: str | None = None,
    question: str | None = None,
    method: Method = "likelihood",
    context: Literal["none", "predicted"] | None = None,
) -> Asked:
    """Asks about one picture (or none, for text-only tasks).

    Args:
        reader: of a model that `adapter` was applied to.
        adapter: what is trained.
        image: the picture.
        task: which task answers; "all" for every trained one, level by level; None finds it by `question`.
        question: the question in other words than the graph's.
        method: as in `evaluate`.
        context: "none", or "predicted" to put the prerequisites' own answers into the prompt; None as each task was
            trained. A prerequisite without a block is left out.

    Raises:
        ConfigError: E104 for an unknown task, E108 if task and question do not say what is asked. AdapterError E317 if
            the task is not trained. DataError for the picture.
    """
    tasks = asked_tasks(adapter, task, question)
    if image is not None:
        check_image(image)
    worded = {tasks[0]: question} if question is not None else {}
    example = Example("asked", Path(image) if image else None, {}, worded, "test")
    ways = {t: context or adapter.context(t) for t in adapter.blocks}
    given: dict[str, Answers] = {}
    for name in tasks:
        known = context_for(reader, [example], name, ways, given)
        given[name] = answer(reader, [example], name, method=method, known=known)
    found = {t: given[t][example.id] for t in tasks}
    return Asked(
        found, {t: worded.get(t) or adapter.graph.task(t).question for t in tasks}, warnings_for(adapter, tasks)
    )


def asked_tasks(adapter: Adapter, task: str | None, question: str | None) -> list[str]:
    """The trained tasks that are meant, in the order they are asked."""
    graph = adapter.graph
    if task == ALL and ALL not in graph.tasks:
        if question is not None:
            raise ConfigError("E108", "--question goes with one task, not with all", where="--task")
        trained = [t for level in graph.levels() for t in level if t in adapter.blocks]
        if not trained:
            raise AdapterError("E317", "no task is trained here", where=graph.name)
        return trained
    if task is None:
        task = _task_of(graph, question)
    graph.task(task)
    if task not in adapter.blocks:
        has = ", ".join(adapter.blocks) or "none"
        raise AdapterError("E317", f"task '{task}' has no block here; trained: {has}", where=graph.name)
    return [task]


def warnings_for(adapter: Adapter, tasks: Sequence[str]) -> list[str]:
    """What is missing or out of date about the blocks of `tasks` and their prerequisites."""
    stale = adapter.stale()
    found = [f"'{t}' should be trained again: {stale[t]}" for t in tasks if t in stale]
    for t in tasks:
        found += [
            f"'{p}', a prerequisite of '{t}', is not here; '{t}' answers without it"
            for p in adapter.missing(t)
            if f"'{p}'" not in stale.get(t, "")
        ]
        found += [
            f"'{p}', a prerequisite of '{t}', should be trained again: {stale[p]}"
            for p in adapter.graph.prerequisites(t)
            if p in stale and p in adapter.blocks and p not in tasks
        ]
    return list(dict.fromkeys(found))


def _task_of(graph: TaskGraph, question: str | None) -> str:
    """The task whose question is nearest to `question`; the only task needs none."""
    if len(graph.names) == 1:
        return graph.names[0]
    asked = {t.question.casefold(): name for name, t in graph.tasks.items()}
    near = difflib.get_close_matches((question or "").casefold(), asked, n=1, cutoff=0.75)
    if not near:
        what = "no task asks anything like it" if question else "say what to ask"
        raise ConfigError("E108", f"{what}; give --task, one of: {', '.join(graph.names)}, or all", where="ask")
    return asked[near[0]]
