"""From a recipe to jobs: one training (or none) and one measurement each, named by all that decides their result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

from contextlora.config import TrainConfig
from contextlora.data.records import data_hash
from contextlora.data.scenes import SCENARIOS, VERSION, scenario_graph
from contextlora.errors import ConfigError, DataError, did_you_mean
from contextlora.federated.federation import Federation
from contextlora.graph import TaskGraph
from contextlora.reports.kinds import KINDS
from contextlora.reports.recipe import FEDERATIONS, Arm, Recipe, merged
from contextlora.strict import validate

# Of a result's file and of what is measured: raise it with every change that makes old results wrong, and with every
# default of TrainConfig that changes. Ids leave defaults out, so that a new option leaves finished jobs finished.
FORMAT = 1
Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Data:
    """The pictures of one scenario.

    Attributes:
        scenario: as the recipe names it.
        key: says which pictures they are: equal keys, equal bytes.
        folder: the data folder; None for a drawn scenario, whose folder the worker makes.
        graph: its tasks.
    """

    scenario: str
    key: str
    folder: Path | None
    graph: TaskGraph


@dataclass(frozen=True)
class Job:
    """One cell of a comparison.

    Attributes:
        arm: the name of the arm.
        point: the sweep's keys and the values they take here.
        seed: of training.
        data: what is trained and measured on.
        kind: "trained", "zero_shot" or "answers".
        config: the training, everything put together; of an untrained arm only `context` matters, and what its base
            was aligned on.
        graph: the arm's: ranks and prerequisites may differ from the data's.
        answers: the file of imported answers.
        model: the base model.
        base: names the aligned base model, shared by all jobs that may use it.
        id: names the result. Cells that cannot differ, such as an untrained model's under two seeds, share one.
        poisoned: of `measure: repair`, the task whose answers are shuffled.
        federation: of measures of federations, the keys of its YAML, and `devices`, `questions` and `alone`.
    """

    arm: str
    point: Point
    seed: int
    data: Data
    kind: Literal["trained", "zero_shot", "answers"]
    config: TrainConfig
    graph: TaskGraph
    answers: Path | None
    model: str
    base: str
    id: str
    poisoned: str | None = None
    federation: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def title(self) -> str:
        """What a progress bar says."""
        place = Path(self.data.scenario).name
        return " · ".join([place, self.arm, *(f"{k} {v}" for k, v in self.point), f"seed {self.seed}"])

    @property
    def of_federation(self) -> dict[str, Any]:
        """The keys that a federation's YAML has too, but for its devices."""
        return {k: v for k, v in self.federation.items() if k not in ("devices", "questions", "alone")}


def expand(recipe: Recipe) -> list[Job]:
    """All cells of a recipe: seeds outermost, so that one that is interrupted can be read already.

    Raises:
        ConfigError: E103 where settings do not go together, E104 an unknown task in an arm's ranks or in `poisoned`,
            E122 a repair without a task to poison. DataError: for a data folder or a file of answers that cannot be
            read.
    """
    sources = [_data(recipe, s) for s in recipe.scenarios]
    _refuse_unknown_ranks(recipe, sources)
    return [
        _job(recipe, name, arm, point, seed, data)
        for seed in range(recipe.seeds)
        for data in sources
        for point in points(recipe.sweep)
        for name, arm in recipe.arms.items()
    ]


def points(sweep: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """Every combination of a sweep's values; of no sweep, the empty one."""
    for values in product(*sweep.values()):
        yield tuple(zip(sweep, values, strict=True))


def unique(jobs: Sequence[Job]) -> list[Job]:
    """The jobs to be done: the first of each id, in order."""
    return list({j.id: j for j in reversed(jobs)}.values())[::-1]


def _job(recipe: Recipe, name: str, arm: Arm, point: Point, seed: int, data: Data) -> Job:
    of_training = {k: v for k, v in point if k != "devices"}
    settings = {**recipe.train.model_dump(exclude_unset=True), **arm.overrides(), **of_training, "seed": seed}
    config = validate(TrainConfig, settings, f"arms.{name}")
    graph = _graph(data.graph, arm)
    model = arm.model or recipe.model
    base = _base(recipe, model, data, config)
    what: dict[str, Any] = {"format": FORMAT, "measure": recipe.measure, "data": data.key, "split": recipe.split}
    what |= {"kind": arm.kind, "graph": data.graph.to_dict()}
    if (version := KINDS[recipe.measure].version) > 1:
        what["version"] = version
    if recipe.measure == "inference":  # times differ from round to round, whatever is timed
        what["seed"] = seed
    federation = _federation(recipe, arm, point) if recipe.measure in FEDERATIONS else {}
    if federation:
        what["federation"] = federation
    poisoned = _poisoned(recipe, data, config) if recipe.measure == "repair" else None
    if poisoned is not None:
        what["poisoned"] = poisoned
    path = Path(arm.answers.replace("{scenario}", Path(data.scenario).name)) if arm.answers else None
    if path is not None:
        what["answers"] = _sha256(path)
    else:
        what |= {"base": base, "device": recipe.device, "context": config.context}
    if arm.kind == "trained":
        train = config.model_dump(exclude_defaults=True, exclude={"checkpoint_every"})
        if config.frozen_ratio == graph.frozen_ratio:  # said twice, it is the graph's all the same
            del train["frozen_ratio"]
        what |= {"graph": graph.to_dict(), "train": train}
    job = Job(name, point, seed, data, arm.kind, config, graph, path, model, base, short(what), poisoned, federation)
    return job if arm.kind == "trained" else replace(job, graph=data.graph)


def _federation(recipe: Recipe, arm: Arm, point: Point) -> dict[str, Any]:
    """What a job's federation is made of. Raises ConfigError E103 for keys that no federation has."""
    keys = merged(recipe.federation, arm.federation)
    validate(Federation, {**keys, "devices": {"device": "task"}}, "federation")
    devices = dict(point).get("devices", recipe.devices)
    return {**keys, "devices": devices, "questions": recipe.questions, "alone": arm.alone}


def _poisoned(recipe: Recipe, data: Data, config: TrainConfig) -> str:
    """The task that a repair poisons in a scenario.

    Raises ConfigError E104 for an unknown one, E122 for none, or for label noise besides.
    """
    name = Path(data.scenario).name
    task = recipe.poisoned.get(name)
    if task is None:
        text = f"which task of '{name}' is poisoned? Add poisoned: {{{name}: TASK}}, TASK one of"
        raise ConfigError("E122", f"{text}: {', '.join(data.graph.names)}", where=recipe.name)
    if task not in data.graph.tasks:
        text = f"'{name}' has no task '{task}'.{did_you_mean(task, data.graph.names)}"
        raise ConfigError("E104", f"{text} There are: {', '.join(data.graph.names)}", where=f"poisoned.{name}")
    if config.label_noise or config.noise_tasks is not None:
        text = "repair shuffles all answers of the task in `poisoned`; leave out label_noise and noise_tasks"
        raise ConfigError("E122", text, where=recipe.name)
    return task


def _graph(graph: TaskGraph, arm: Arm) -> TaskGraph:
    """The graph as an arm has it. A rank of a task that only other scenarios have is passed over."""
    tasks = {n: t.model_copy(update={"rank": arm.ranks.get(n, t.rank)}) for n, t in graph.tasks.items()}
    return replace(graph, tasks=tasks, prerequisite_rule=arm.prerequisites or graph.prerequisite_rule)


def _base(recipe: Recipe, model: str, data: Data, config: TrainConfig) -> str:
    """Names the base model that a job starts from: what was aligned, how, and on which examples.

    The seed counts only where it decides which examples or labels training sees: all other seeds share a base.
    """
    what: dict[str, Any] = {"model": model, "dtype": recipe.dtype}
    if recipe.align.epochs is not None:
        what |= {"align": recipe.align.model_dump(), "data": data.key}
        what |= {"max_train": config.max_train, "label_noise": config.label_noise}
        what["seed"] = config.seed if config.max_train or config.label_noise else None
    return short(what)


def _data(recipe: Recipe, scenario: str) -> Data:
    if scenario in SCENARIOS:
        sizes = recipe.data.model_dump()
        key = short({"scenario": scenario, "version": VERSION, **sizes})
        return Data(scenario, key, None, scenario_graph(scenario))
    folder = Path(scenario).resolve()
    return Data(scenario, data_hash(folder), folder, TaskGraph.load(folder / "graph.yaml"))


def _refuse_unknown_ranks(recipe: Recipe, sources: Sequence[Data]) -> None:
    """Raises ConfigError E104 for ranks of a task that no scenario has."""
    known = {task for data in sources for task in data.graph.names}
    for name, arm in recipe.arms.items():
        for task in arm.ranks:
            if task not in known:
                text = f"no scenario has a task '{task}'.{did_you_mean(task, known)}"
                raise ConfigError("E104", text, where=f"arms.{name}.ranks")


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise DataError("E201", f"cannot be read: {e.strerror}", where=path) from None


def short(what: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name `what`."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
