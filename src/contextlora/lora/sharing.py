"""Which blocks each task uses and which ranks of them it trains: what tells methods on the gated layer apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from contextlora.config import TrainConfig
from contextlora.errors import ConfigError
from contextlora.graph import TaskGraph

if TYPE_CHECKING:  # planning a training on a device without torch comes by here
    from torch import Tensor


@dataclass(frozen=True)
class Sharing:
    """The gate of every task (SEMANTICS section 1, column "gate").

    Attributes:
        active: by task, the blocks that are on, in declared order.
        learns: by task, how many leading ranks of which blocks its samples may train.
    """

    active: Mapping[str, tuple[str, ...]]
    learns: Mapping[str, Mapping[str, int]]

    @cached_property
    def stamp(self) -> int:
        """A number that two sharings have in common only if they are alike."""
        return hash(repr((dict(self.active), {t: dict(n) for t, n in self.learns.items()})))


def all_for_all(graph: TaskGraph, learns: Mapping[str, int]) -> Sharing:
    """Every block is on for every task, and whatever `learns` names learns from all samples."""
    return Sharing(dict.fromkeys(graph.names, graph.names), dict.fromkeys(graph.names, learns))


def own_alone(graph: TaskGraph) -> Sharing:
    """Every task has its own block on, and no other."""
    return Sharing({t: (t,) for t in graph.names}, {t: {t: graph.rank_of(t)} for t in graph.names})


def along_graph(graph: TaskGraph, frozen_ratio: float | None = None) -> Sharing:
    """ContextLoRA: a task and its prerequisites are on; the task's block learns, and delta of its prerequisites'."""
    return Sharing(
        {t: graph.active(t) for t in graph.names}, {t: trainable_ranks(graph, t, frozen_ratio) for t in graph.names}
    )


def trainable_ranks(graph: TaskGraph, task: str, frozen_ratio: float | None = None) -> dict[str, int]:
    """How many leading ranks of which blocks learn when `task` trains along the graph.

    W[v] learns whole, and of each p in P(v) the first round(delta r_p) ranks, delta = 1 - frozen_ratio.
    """
    ratio = graph.frozen_ratio if frozen_ratio is None else frozen_ratio
    if not 0 <= ratio <= 1:
        raise ConfigError("E110", f"frozen_ratio is a share between 0 and 1, got {ratio}")
    partly = {p: round((1 - ratio) * graph.rank_of(p)) for p in graph.prerequisites(task)}
    return {p: n for p, n in {**partly, task: graph.rank_of(task)}.items() if n}


def levels(graph: TaskGraph, tasks: Iterable[str]) -> list[list[str]]:
    """The graph's levels S_1..S_L of these tasks alone, those without any left out."""
    wanted = set(tasks)
    return [mine for level in graph.levels() if (mine := [t for t in level if t in wanted])]


def stages(graph: TaskGraph, tasks: Iterable[str], config: TrainConfig) -> list[list[str]]:
    """The tasks that train together along the graph, stage after stage.

    With `schedule: level` these are the levels S_1..S_L. With `sequential`, and in a level where delta > 0 lets two
    tasks tune ranks of the same prerequisite, one task at a time in declared order (Algorithm 1).
    """
    learns = along_graph(graph, config.frozen_ratio).learns
    plan: list[list[str]] = []
    for level in levels(graph, tasks):
        owners = [o for t in level for o in learns[t]]
        together = config.schedule == "level" and len(owners) == len(set(owners))
        plan += [level] if together else [[t] for t in level]
    return plan


@dataclass(frozen=True)
class Phase:
    """Runs that train side by side, each with an optimizer of its own over the samples of its tasks.

    Attributes:
        runs: the tasks of each run.
        sharing: the gates meanwhile. An owner in `learns` that is no task is something else the method's layers hold,
            such as a router.
        penalty: added to a run's loss times the configured weight, given the adapted layers and the run's tasks.
        prepare: what is done to the layers before the first update, given the result of the phases before.
        share: how much of the opened parameters learns, where a mask holds the rest at zero.
        divided: the configured batch is divided among the runs, instead of each having one of that size.
        trial: what it trains is thrown away again, so it does not count among the trained parameters.
        gates: what learns are gates over frozen experts, at the learning rate that is configured for those.
    """

    runs: tuple[tuple[str, ...], ...]
    sharing: Sharing
    penalty: Callable[[Iterable[Any], tuple[str, ...]], Tensor] | None = None
    prepare: Callable[[Iterable[Any]], None] | None = None
    share: float = 1.0
    divided: bool = False
    trial: bool = False
    gates: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks of its runs."""
        return tuple(t for run in self.runs for t in run)

    def batch_size(self, configured: int) -> int:
        """Samples of one run in one micro-batch."""
        return max(1, configured // len(self.runs)) if self.divided else configured


@dataclass(frozen=True)
class Plan:
    """A method laid out for one graph: who trains when, and which blocks are on.

    Attributes:
        phases: one after another.
        answering: the gates ever after.
    """

    phases: tuple[Phase, ...]
    answering: Sharing


def all_at_once(tasks: Iterable[str], sharing: Sharing) -> Plan:
    """One run over the mixed samples of all tasks."""
    return Plan((Phase((tuple(tasks),), sharing),), sharing)


def level_by_level(graph: TaskGraph, tasks: Iterable[str], sharing: Sharing) -> Plan:
    """The tasks of a level side by side, each in a run of its own; one level after another."""
    phases = (Phase(tuple((t,) for t in level), sharing) for level in levels(graph, tasks))
    return Plan(tuple(phases), sharing)
