"""From the numbers of `options` back to groups."""

from __future__ import annotations

import numpy as np

from contextlora.gear.cost import Problem, predict
from contextlora.gear.explore import local_seconds
from contextlora.gear.options import STREAMED, Options
from contextlora.gear.pipelines import PLAIN
from contextlora.gear.plan import Group, Part
from contextlora.gear.tables import bits


def group_of(problem: Problem, o: Options, slot: int, mask: int, tasks: tuple[str, ...], limit: float) -> Group:
    """The group that a slot holds for a set of devices, without prefix devices that `limit` seconds do not need."""
    s, trainers, names = o.slots[slot], int(o.trainers[slot, mask]), list(problem.fleet.devices)
    cut, ahead, cached = 0, "none", s.kind in ("local", "cached")
    if s.kind == "local":
        stages = _local(o, slot, mask)
        cut, ahead = min(o.lowest, stages[0][2]), "local"
    else:
        cut = int(o.cut[slot, mask])
        ahead = "streamed" if cut else "none"
        if s.kind.startswith("data"):
            stages = [(d, cut, problem.units) for d in o.rings.best(trainers, o.slice)[2]]
        else:
            stages = _stages(o, slot, mask, cut)
    form = "data" if s.kind.startswith("data") else "pipeline" if len(stages) > 1 else "single"
    able = o.able(s.k, mask ^ trainers, cut) if cut and s.kind != "local" else []
    made = Group.model_validate(
        {
            "tasks": tasks,
            "form": form,
            "trainers": [Part(device=names[d], start=a, stop=b) for d, a, b in stages],
            "size": s.k,
            "ahead": ahead,
            "prefix": [Part(device=names[d], start=0, stop=cut) for d in able],
            "cut": cut,
            "cache": cached,
        }
    )
    return _leaner(problem, made, limit)


def _stages(o: Options, slot: int, mask: int, cut: int) -> list[tuple[int, int, int]]:
    s, trainers, pipelines = o.slots[slot], int(o.trainers[slot, mask]), o.pipelines[o.slots[slot].k]
    if s.stages == 1:
        return [(trainers.bit_length() - 1, cut, pipelines.units)]
    kept = STREAMED[s.kind][1] if s.kind in STREAMED else PLAIN
    return pipelines.trace(pipelines.probe(float(o.tau[slot, mask])), trainers, s.x, cut, kept)


def _local(o: Options, slot: int, mask: int) -> list[tuple[int, int, int]]:
    """The first trainer and its end give the least seconds as `explore` bounds them; then the least fill."""
    s, case, pipelines = o.slots[slot], o.cases[o.slots[slot].k], o.pipelines[o.slots[slot].k]
    mask = int(o.trainers[slot, mask])
    if s.stages == 1:
        return [(mask.bit_length() - 1, 0, pipelines.units)]
    probe, found = pipelines.probe(float(o.tau[slot, mask])), []
    for d in bits(mask) if o.shared else [s.x]:
        stop = int(case.reach(s.stages, case.cached)[d, 0]) + 1
        after = pipelines.after(probe, mask, d, s.x)[1:stop]
        if np.isfinite(after).any():
            seconds = local_seconds(o, case, d, after, probe.tau, o.medium(s.k, s.stages)[s.x], s.stages)
            found.append((float(seconds.min()), d, 1 + int(seconds.argmin())))
    _, d, stop = min(found)
    rest = mask ^ 1 << d
    return [(d, 0, stop), *pipelines.trace(probe, rest, pipelines.next_x(probe, mask, d, s.x, stop), stop, PLAIN)]


def _leaner(problem: Problem, g: Group, limit: float) -> Group:
    for part in reversed(g.prefix):
        fewer = g.model_copy(update={"prefix": tuple(p for p in g.prefix if p != part)})
        if fewer.prefix and predict(problem, fewer).seconds <= limit:
            g = fewer
    return g
