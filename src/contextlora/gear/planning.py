"""From a run's configuration, a fleet and profiles to a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

from contextlora.config import RunConfig, select_layers
from contextlora.data.examples import load_examples
from contextlora.errors import PlanError, did_you_mean
from contextlora.gear.algorithm2 import algorithm2
from contextlora.gear.cost import Problem, pace, there_and_back
from contextlora.gear.exact import exact
from contextlora.gear.fleet import Fleet
from contextlora.gear.plan import Group, Part, Plan
from contextlora.gear.profile import Profile
from contextlora.gear.simulate import simulated_seconds
from contextlora.gear.units import show_bytes
from contextlora.gear.work import work_of
from contextlora.graph import TaskGraph

Planner = Literal["exact", "algorithm2"]
PLANNERS: Mapping[str, Callable[[Problem, Sequence[int]], Plan]] = {
    "exact": partial(exact, judge=simulated_seconds),
    "algorithm2": algorithm2,
}
SHIPPED = resources.files("contextlora") / "gear" / "shipped"
SIZES = (1, 2, 4, 8)


def problem_of(config: RunConfig, fleet: Fleet, profile: Profile, samples: int | None = None) -> Problem:
    """What a run asks of a fleet.

    Args:
        config: the run: its graph, data and training.
        fleet: the devices; those with a profile of their own use that.
        profile: of all others.
        samples: training samples of every task; None counts those in the run's data.

    Raises:
        ConfigError, DataError: for a graph or data that cannot be read. PlanError: E403 a device's profile that is of
            another model, E404 tasks without samples, or layers that the model has not.
    """
    graph = TaskGraph.load(config.graph_path)
    layers = select_layers(config.train.layers, len(profile.units) - 2)
    counts = dict.fromkeys(graph.names, samples) if samples is not None else _samples(config, graph)
    profiles = {}
    for name, device in fleet.devices.items():
        own = profile if device.profile is None else Profile.load(fleet.home / device.profile)
        if [u.name for u in own.units] != [u.name for u in profile.units]:
            text = f"the profile of '{name}' is of '{own.model}', {len(own.units)} units; the others' of"
            raise PlanError("E403", f"{text} '{profile.model}', {len(profile.units)}", where=device.profile or "")
        profiles[name] = own
    return Problem(fleet, profiles, work_of(graph, config.train, counts, len(profile.units), layers))


def _samples(config: RunConfig, graph: TaskGraph) -> dict[str, int]:
    examples = load_examples(config.data, graph, split="train")
    found = Counter(t for e in examples for t in e.answers)
    most = config.train.max_train
    return {t: min(found[t], most) if most is not None else found[t] for t in graph.names}


def load_fleet(name: str) -> Fleet:
    """A fleet file, or one that is shipped, by its name. Raises PlanError E401, E402, ConfigError E101 to E103."""
    return Fleet.load(_find(name, ".yaml", "fleet"))


def load_profile(name: str) -> Profile:
    """A profile, or one that is shipped, by its name. Raises PlanError E403, ConfigError E103."""
    return Profile.load(_find(name, ".json", "profile"))


def shipped(suffix: str) -> list[str]:
    """Names of what is shipped."""
    return sorted(Path(f.name).stem for f in SHIPPED.iterdir() if f.name.endswith(suffix))


def _find(name: str, suffix: str, what: str) -> Path:
    if name.endswith((".yaml", ".yml", ".json")):
        return Path(name)
    if name not in (known := shipped(suffix)):
        text = f"no {what} '{name}'.{did_you_mean(name, known)} Give a file, or one of: {', '.join(known)}"
        raise PlanError("E407", text)
    return Path(str(SHIPPED / f"{name}{suffix}"))


def make_plan(problem: Problem, planner: str = "exact", sizes: Sequence[int] = SIZES) -> Plan:
    """A plan by one of PLANNERS. Raises PlanError E406 if nothing fits, E407 for an unknown planner."""
    if planner not in PLANNERS:
        raise PlanError("E407", f"no planner '{planner}'.{did_you_mean(planner, PLANNERS)} Use: {', '.join(PLANNERS)}")
    made = PLANNERS[planner](problem, sizes)
    stages = [
        s.model_copy(
            update={"groups": tuple(g.model_copy(update={"group": paced(problem, g.group)}) for g in s.groups)}
        )
        for s in made.stages
    ]
    return made.model_copy(update={"stages": tuple(stages)})


def paced(problem: Problem, group: Group) -> Group:
    """The group with the seconds by which its devices, who know no profile, deal micro-batches as the plan did."""
    trainers = [p.model_copy(update={"seconds": there_and_back(problem, p, group)}) for p in group.trainers]
    prefix = [p.model_copy(update={"seconds": pace(problem, group, p)}) for p in group.prefix]
    return group.model_copy(update={"trainers": tuple(trainers), "prefix": tuple(prefix)})


def rows(problem: Problem, plan: Plan) -> list[dict[str, str]]:
    """A plan as a table: a row for each device and stage."""
    found = []
    for number, stage in enumerate(plan.stages, 1):
        for planned in stage.groups:
            g, p = planned.group, planned.predicted
            for part in (*g.prefix, *g.trainers):
                use, has = p.devices[part.device], problem.fleet.devices[part.device].memory
                found.append(
                    {
                        "stage": f"{number}: {', '.join(g.tasks)}",
                        "device": part.device,
                        "does": _does(problem, planned.group, part),
                        "micro-batch": str(g.size),
                        "step": f"{p.step:.3g} s",
                        "busy": f"{100 * use.busy / p.seconds:.0f} %" if p.seconds else "",
                        "memory": f"{show_bytes(use.memory)} of {show_bytes(has)}",
                        "sends": show_bytes(use.sent),
                    }
                )
    return found


def _does(problem: Problem, group: Group, part: Part) -> str:
    """What a device does, in words."""
    names = [u.name for u in problem.any_profile.units[part.start : part.stop]]
    units = "all" if len(names) == problem.units else f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
    if part in group.prefix:
        return f"streams ahead: {units}"
    how = {"single": "trains", "data": "trains a share", "pipeline": "pipeline"}[group.form]
    kept = f", keeps what enters unit {group.cut}" if group.cache and part is group.trainers[0] else ""
    return f"{how}: {units}{kept}"
