"""What has to be trained: stages of the task graph, samples of each task, which units carry blocks. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contextlora.config import TrainConfig
from contextlora.errors import PlanError
from contextlora.graph import TaskGraph
from contextlora.lora.sharing import along_graph, stages


@dataclass(frozen=True)
class TaskLoad:
    """One task's share of the work.

    Attributes:
        name: the task.
        samples: training samples an epoch.
        ranks: that learn from them: its own block's, and with a frozen ratio below 1 some of its prerequisites'.
        active: ranks that are on while it trains.
    """

    name: str
    samples: int
    ranks: int
    active: int


@dataclass(frozen=True)
class Work:
    """A training, as far as its cost goes.

    Attributes:
        stages: the tasks that may train side by side, stage after stage.
        batch: samples of one task in one update.
        epochs: passes over each task's samples.
        lowest: the first unit that carries blocks; everything below is forward-only.
        highest: the last one that does.
    """

    stages: tuple[tuple[TaskLoad, ...], ...]
    batch: int
    epochs: int
    lowest: int
    highest: int

    def updates(self, task: TaskLoad) -> int:
        """Updates of one epoch."""
        return math.ceil(task.samples / self.batch)

    def intervals(self, tasks: Sequence[TaskLoad]) -> list[tuple[int, int, int]]:
        """Runs of equal steps when `tasks` train in mixed batches: (steps, active tasks, of them in their first epoch).

        A task that has fewer samples than another ends earlier, and steps get smaller.
        """
        first = [self.updates(t) for t in tasks]
        marks = sorted({0, *first, *(n * self.epochs for n in first)})
        return [
            (b - a, sum(n * self.epochs > a for n in first), sum(n > a for n in first))
            for a, b in itertools.pairwise(marks)
        ]


def work_of(graph: TaskGraph, config: TrainConfig, samples: Mapping[str, int], units: int, layers: range) -> Work:
    """The work of a run.

    Args:
        samples: training samples of each task.
        units: of the model, see `profile`.
        layers: the decoder layers that carry blocks, counted from 0.

    Raises:
        PlanError: E404 for a task without samples, or layers that the model has not.
    """
    for t in graph.names:
        if samples.get(t, 0) < 1:
            raise PlanError("E404", f"task '{t}' has no training sample; give their number")
    if not layers or layers[-1] + 2 >= units:
        raise PlanError("E404", f"blocks on layers {layers.start} to {layers.stop - 1} of a model with {units - 2}")
    learns = along_graph(graph, config.frozen_ratio).learns

    def load(t: str) -> TaskLoad:
        active = sum(graph.rank_of(n) for n in graph.active(t))
        return TaskLoad(t, samples[t], sum(learns[t].values()), active)

    order = stages(graph, graph.names, config)
    at_once = config.batch_size * config.accumulate
    return Work(tuple(tuple(map(load, s)) for s in order), at_once, config.epochs, layers[0] + 1, layers[-1] + 1)
