"""Who trains when: a method of the configuration, laid out for a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from contextlora.baselines import lora, olora
from contextlora.config import TrainConfig
from contextlora.graph import TaskGraph
from contextlora.lora.sharing import Plan, along_graph

RIVALS: dict[str, Callable[[TaskGraph, Sequence[str]], Plan]] = {
    "lora": lora.joint,
    "lora-per-task": lora.per_task,
    "o-lora": olora.one_after_another,
}


def planned(graph: TaskGraph, tasks: Iterable[str] | None, config: TrainConfig) -> Plan:
    """The plan of `config.method` for `tasks`, None for all. Raises ConfigError E104 for an unknown task."""
    wanted = {t for t in (graph.names if tasks is None else tasks) if graph.task(t)}
    if config.method != "paper":
        return RIVALS[config.method](graph, [t for t in graph.names if t in wanted])
    sharing = along_graph(graph, config.frozen_ratio)
    runs = tuple(tuple((t,) for t in names) for names in stages(graph, wanted, config))
    return Plan(runs, sharing, along_graph(graph))


def stages(graph: TaskGraph, tasks: Iterable[str], config: TrainConfig) -> list[list[str]]:
    """The tasks that train together along the graph, stage after stage.

    With `schedule: level` these are the levels S_1..S_L. With `sequential`, and in a level where delta > 0 lets two
    tasks tune ranks of the same prerequisite, one task at a time in declared order (Algorithm 1).
    """
    wanted = set(tasks)
    learns = along_graph(graph, config.frozen_ratio).learns
    plan: list[list[str]] = []
    for level in filter(None, ([t for t in level if t in wanted] for level in graph.levels())):
        owners = [o for t in level for o in learns[t]]
        together = config.schedule == "level" and len(owners) == len(set(owners))
        plan += [level] if together else [[t] for t in level]
    return plan
