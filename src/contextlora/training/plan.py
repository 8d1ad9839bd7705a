"""Which method: who trains when, and which layers it needs on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from contextlora.baselines import copies, depth, hydralora, lora, lori, mole, olora, scales, shared
from contextlora.config import TrainConfig
from contextlora.errors import ConfigError
from contextlora.graph import TaskGraph
from contextlora.lora.attach import Make, attach, trainable_groups
from contextlora.lora.sharing import Phase, Plan, along_graph, stages

RIVALS: dict[str, Callable[[TaskGraph, Sequence[str]], Plan]] = {
    "lora": lora.joint,
    "lora-per-task": lora.per_task,
    "hard-routing": lora.by_question,
    "o-lora": olora.one_after_another,
    "hydralora": hydralora.plan,
    "mole": mole.plan,
    "mole-joint": mole.joint,
    "lori-d": lori.dense,
    "lori-s": lori.sparse,
    "copies": copies.plan,
    "low-prerequisites": depth.plan,
    "by-depth": depth.plan,
    "learned-scales": scales.plan,
    "shared-block": shared.plan,
}
LAYERS: dict[str, Callable[[int], Make]] = {  # of the rivals that need others than the graph's blocks, by seed
    "hydralora": hydralora.layers,
    "mole": mole.layers,
    "mole-joint": mole.layers,
    "lori-d": lori.layers,
    "lori-s": lambda seed: lori.layers(seed, lori.KEPT),
    "low-prerequisites": depth.low,
    "by-depth": depth.placed,
    "learned-scales": scales.layers,
    "shared-block": shared.layers,
}


def planned(graph: TaskGraph, tasks: Iterable[str] | None, config: TrainConfig) -> Plan:
    """The plan of `config.method` for `tasks`, None for all.

    Raises ConfigError E104 for an unknown task, E119 if tasks would be asked before they are trained.
    """
    wanted = {t for t in (graph.names if tasks is None else tasks) if graph.task(t)}
    at_once = "schedule: together" if config.schedule == "together" else config.method
    if at_once != "paper" and config.context == "predicted":
        text = f"'{at_once}' trains tasks before their prerequisites can answer; use gold or none"
        raise ConfigError("E119", text, where="train.context")
    if config.method != "paper":
        return RIVALS[config.method](graph, [t for t in graph.names if t in wanted])
    sharing = along_graph(graph, config.frozen_ratio)
    if config.schedule == "together":
        everyone = tuple(t for t in graph.names if t in wanted)
        return Plan((Phase((everyone,), sharing),), along_graph(graph))
    phases = (Phase(tuple((t,) for t in names), sharing) for names in stages(graph, wanted, config))
    return Plan(tuple(phases), along_graph(graph))


def refuse_a_rival(config: TrainConfig) -> None:
    """Raises ConfigError E114 for a method that makes no adapter."""
    if config.method in RIVALS:
        text = f"'{config.method}' makes no adapter to deploy; `contextlora report` compares it. Use: paper"
        raise ConfigError("E114", text, where="train.method")


def prepare(model: nn.Module, graph: TaskGraph, config: TrainConfig) -> None:
    """Puts the layers that `config.method` needs on a model, in place. Raises as `attach`."""
    make = LAYERS[config.method](config.seed) if config.method in LAYERS else None
    attach(model, graph, layers=config.layers, targets=config.targets, seed=config.seed, make=make)


def count_trained(model: nn.Module, plan: Plan) -> int:
    """How many parameters a plan trains, routers included, each once however often; leaves everything frozen."""
    found: dict[int, float] = {}
    for phase in (p for p in plan.phases if not p.trial):
        for group in trainable_groups(model, phase.tasks, phase.sharing).values():
            for p in group:  # a block's first ranks may have learned before the whole of it
                found[p.data_ptr()] = max(found.get(p.data_ptr(), 0), phase.share * p.numel())
    trainable_groups(model, [], plan.answering)
    return round(sum(found.values()))
