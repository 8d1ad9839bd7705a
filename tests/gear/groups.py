"""Random groups of every form on small random problems."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import small

from contextlora.gear import cost
from contextlora.gear.fleet import Fleet
from contextlora.gear.plan import Group, Part, PlannedGroup, PlannedStage, check_group


def parts(*spans):
    return tuple(Part(device=d, start=a, stop=b) for d, a, b in spans)


def group(form, *trainers, size=2, tasks=("t0", "t1"), prefix=(), **more):
    """A group from (device, start, stop) tuples."""
    return Group(tasks=tasks, form=form, trainers=parts(*trainers), size=size, prefix=parts(*prefix), **more)


def with_cut(problem, size):
    """The same problem with other bytes a sample at every boundary."""
    other = problem.any_profile.model_copy(update={"cut": size})
    return dataclasses.replace(problem, profiles=dict.fromkeys(problem.profiles, other))


def draw(seed, cut=1e6):
    """A problem and a valid group on some of its devices; `cut` bytes a sample cross a boundary."""
    r = random.Random(seed)
    devices, units = r.randint(1, 5), r.randint(5, 9)
    p = small.problem(devices, units, tasks=r.randint(1, 3), lowest=r.randint(1, 3), seed=seed, shared=r.random() < 0.5)
    p = with_cut(p, cut)
    names = list(p.fleet.devices)
    r.shuffle(names)
    ahead, prefix, low = "none", (), 0
    if devices > 1 and r.random() < 0.4:
        low, count = r.randint(1, p.work.lowest), r.randint(1, devices - 1)
        ahead, prefix, names = "streamed", tuple((d, 0, low) for d in names[:count]), names[count:]
    form = r.choice(["single", "data", "pipeline"]) if len(names) > 1 else "single"
    names = names[: 1 if form == "single" else r.randint(2, min(4, len(names)))]
    spans = [(d, low, units) for d in names]
    if form == "pipeline":
        inner = sorted(r.sample(range(low + 1, units), len(names) - 1))
        spans = list(zip(names, [low, *inner], [*inner, units], strict=True))
    cache = form != "data" and ahead == "streamed" and r.random() < 0.5
    if ahead == "none" and form != "data" and r.random() < 0.3 and spans[0][2] >= p.work.lowest:
        ahead, low, cache = "local", p.work.lowest, True
    tasks = tuple(p.loads)
    g = group(form, *spans, size=r.choice([1, 2, 3]), tasks=tasks, prefix=prefix, ahead=ahead, cut=low, cache=cache)
    check_group(g, units, p.work.lowest, p.fleet)
    return p, g


def full(p, g):
    """Micro-batches of a full step."""
    return math.ceil(len(g.tasks) * p.work.batch / g.size)


def rewired(p, *, rate=None, delay=None, shared=True):
    """The same devices, every pair with the same rate and delay."""
    names = list(p.fleet.devices)
    data = {"devices": {n: d.model_dump(exclude_none=True) for n, d in p.fleet.devices.items()}}
    if shared:
        data["medium"] = {"rate": rate, "delay": delay}
    else:
        data["links"] = [{"between": pair, "rate": rate, "delay": delay} for pair in itertools.combinations(names, 2)]
    return dataclasses.replace(p, fleet=Fleet.from_dict(data))


def planned(p, *many):
    """A stage of these groups, as a planner would write it; nothing is exchanged."""
    found = tuple(PlannedGroup(group=g, predicted=cost.predict(p, g)) for g in many)
    return PlannedStage(groups=found, exchange=0.0, seconds=cost.together(p, [f.predicted for f in found]))
