"""What each block contributes: a dependent task answers with one of its blocks masked (ContextLoRA section I-C).

The paper calls the adapter interpretable because every block belongs to one task. Here that is measured: what a task
loses when a prerequisite's block, or its own, is taken away from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from contextlora.data.collate import Encoder
from contextlora.data.examples import Example, load_examples
from contextlora.errors import ConfigError, DataError
from contextlora.evaluation.evaluate import Answers, answer, context_for
from contextlora.evaluation.metrics import Accuracy, score
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attached_state, block_layers, sharing_as
from contextlora.lora.sharing import Sharing
from contextlora.models.inputs import ImageFeatures

Scores = dict[str, float]  # 0, 0.5 or 1 by example id


@contextmanager
def without_block(model: nn.Module, task: str, block: str) -> Iterator[None]:
    """Inside, `task` answers with `block` masked, which is exactly as if its B were zero; other tasks as ever.

    Enter the task inside (`with model.tasks(task)`, or `answer`, `evaluate`). Masking its only block leaves the base
    model.

    Raises:
        ConfigError: E120 if the block is not on for the task, E104 for an unknown task. AdapterError: E303 on a model
            without blocks of tasks. RunError: E501 within a task.
    """
    with sharing_as(model, lambda now: without(now, task, (block,))):
        yield


def without(sharing: Sharing, task: str, blocks: Sequence[str]) -> Sharing:
    """`sharing` with some blocks masked for one task. Raises ConfigError E104, E120."""
    on = active_blocks(sharing, task)
    for b in blocks:
        if b not in on:
            raise ConfigError("E120", f"the block of '{b}' is not on for task '{task}', which uses: {', '.join(on)}")
    return replace(sharing, active={**sharing.active, task: tuple(b for b in on if b not in blocks)})


def active_blocks(sharing: Sharing, task: str) -> tuple[str, ...]:
    """The blocks that are on for a task. Raises ConfigError E104 for an unknown one."""
    if task not in sharing.active:
        raise ConfigError("E104", f"no task '{task}'; there are: {', '.join(sharing.active)}")
    return sharing.active[task]


@dataclass(frozen=True)
class BlockEffects:
    """What dependent tasks lose with a block masked.

    Attributes:
        tasks: the dependent tasks, in declared order: rows of `matrix`.
        blocks: every task of the graph, in declared order: its columns.
        whole: each task's score of every item with everything on.
        without: the same by masked block; blocks that are not on for the task are left out.
    """

    tasks: tuple[str, ...]
    blocks: tuple[str, ...]
    whole: Mapping[str, Scores]
    without: Mapping[str, Mapping[str, Scores]]

    def accuracy(self, task: str, block: str | None = None) -> Accuracy:
        """A task's accuracy with `block` masked, with None masked nothing."""
        scores = self.whole[task] if block is None else self.without[task][block]
        return Accuracy.of(list(scores.values()))

    def matrix(self) -> NDArray[np.float64]:
        """Accuracy lost, (tasks, blocks), in shares of one; below zero where a task does better without the block.

        NaN where the block is not on for the task anyway.
        """
        lost = np.full((len(self.tasks), len(self.blocks)), np.nan)
        for i, task in enumerate(self.tasks):
            for block in self.without[task]:
                lost[i, self.blocks.index(block)] = self.accuracy(task).mean - self.accuracy(task, block).mean
        return lost


def block_effects(
    model: nn.Module,
    processor: Any,
    graph: TaskGraph,
    *,
    data: str | Path,
    split: str = "test",
    tasks: Iterable[str] | None = None,
    features: ImageFeatures | None = None,
    context: str | Mapping[str, str] = "none",
) -> BlockEffects:
    """Asks each dependent task with everything on, then with each of its active blocks masked in turn.

    Which blocks are on is the model's own sharing: for ContextLoRA the task's and its prerequisites', for joint LoRA
    all. Prerequisites that answer for the prompt (`context="predicted"`) keep all their blocks, so that what is seen
    is the block's work inside the dependent task alone.

    Args:
        model, processor, graph, data, split, features, context: as in `evaluate`.
        tasks: which tasks; None means all that have prerequisites.

    Raises:
        DataError: E230 when the split has no example. ConfigError: E104 for a task that the graph has not.
        AdapterError: E303 on a model without blocks of tasks.
    """
    block_layers(model)
    examples = load_examples(data, graph, split=split)
    if not examples:
        raise DataError("E230", f"no record of split '{split}'", where=data)
    asked = [t for t in graph.names if graph.task(t).after] if tasks is None else [t for t in tasks if graph.task(t)]
    reader = features or ImageFeatures(model, Encoder(processor, graph))
    ways = dict.fromkeys(graph.names, context) if isinstance(context, str) else context
    state = attached_state(model)
    assert state is not None
    given: dict[str, Answers] = {}
    whole: dict[str, Scores] = {}
    masked: dict[str, dict[str, Scores]] = {}
    for task in asked:
        mine = [e for e in examples if task in e.answers]
        known = context_for(reader, mine, task, ways, given)
        whole[task], masked[task] = _scores(reader, mine, task, known), {}
        for block in active_blocks(state.sharing, task):
            with without_block(model, task, block):
                masked[task][block] = _scores(reader, mine, task, known)
    return BlockEffects(tuple(asked), graph.names, whole, masked)


def _scores(
    reader: ImageFeatures, examples: Sequence[Example], task: str, known: Mapping[str, Mapping[str, Sequence[str]]]
) -> Scores:
    said = answer(reader, examples, task, known=known)
    return {e.id: score(said[e.id], e.answers[task]) for e in examples}
