"""Plans as files: what a hand may do to one is either sensible or refused, with its place."""

from __future__ import annotations

import copy
import json
import math
import re

import groups
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import ContextLoRAError, PlanError
from contextlora.gear.plan import Plan
from contextlora.gear.planning import paced
from contextlora.gear.simulate import simulate

# --- plans, and what may happen to them ------------------------------------------------------------------------------


def plan_of(p, *stages):
    """A plan of these groups, stage by stage."""
    made = [groups.planned(p, *(paced(p, g) for g in stage)) for stage in stages]
    names = {"planner": "by hand", "fleet": "f", "model": "m"}
    return Plan(stages=tuple(made), units=p.units, seconds=sum(s.seconds for s in made), **names)


def two_stages():
    """Side by side, then data-parallel behind a prefix."""
    p = small.problem(4, 6, tasks=3, lowest=2, seed=3)
    first = groups.group("pipeline", ("d0", 0, 3), ("d1", 3, 6), tasks=("t0",))
    second = groups.group("single", ("d2", 2, 6), tasks=("t1",), prefix=[("d3", 0, 2)], ahead="streamed", cut=2)
    last = groups.group(
        "data", ("d0", 1, 6), ("d1", 1, 6), tasks=("t2",), prefix=[("d3", 0, 1)], ahead="streamed", cut=1
    )
    return p, plan_of(p, [first, second], [last])


def places(node, path=()):
    """Paths of all values within JSON."""
    yield path
    if isinstance(node, dict | list):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(inner, (*path, key))


def mutated(data, draw):
    """One value dropped, doubled, moved, nudged, or replaced by something odd or by another's."""
    data = copy.deepcopy(data)
    every = [p for p in places(data) if p]
    parts = [p for p in every if p[-1] in ("device", "start", "stop", "cut", "tasks")] or every
    chosen = draw(st.sampled_from(every) | st.sampled_from(parts))
    other = draw(st.sampled_from([p for p in every if str(p[-1]) == str(chosen[-1])]))
    within, last, value = at(data, chosen[:-1]), chosen[-1], copy.deepcopy(at(data, other))
    what = draw(st.sampled_from(["drop", "double", "move", "nudge", "odd", "other", "other"]))
    if what == "drop":
        del within[last]
    elif what == "double" and isinstance(within, list):
        within.append(within[last])
    elif what == "move" and isinstance(within, list):
        within[0], within[last] = within[last], within[0]
    elif what == "nudge" and isinstance(within[last], int | float):
        within[last] += draw(st.sampled_from([1, -1]))
    elif what == "odd":
        within[last] = draw(st.sampled_from([None, True, "nobody", "", 0, -1, 1e9, [], {}]))
    else:
        within[last] = value
    return data


def at(node, path):
    for key in path:
        node = node[key]
    return node


# --- what is accepted makes sense ------------------------------------------------------------------------------------


def whole(plan):
    """Every sample of every task passes every unit once; nobody is in two places."""
    tasks = [t for s in plan.stages for g in s.groups for t in g.group.tasks]
    assert len(tasks) == len(set(tasks))
    for stage in plan.stages:
        used = [d for g in stage.groups for d in g.group.devices]
        assert len(used) == len(set(used))
        for g in (planned.group for planned in stage.groups):
            prefix = {(x.start, x.stop) for x in g.prefix}
            spans = [(x.start, x.stop) for x in g.trainers]
            ways = [[s] for s in spans] if g.form == "data" else [spans]
            for way in ways:
                passed = [u for a, b in [*prefix, *way] for u in range(a, b)]
                assert passed == list(range(plan.units))
            for planned in stage.groups:
                assert all(min(u.memory, u.busy, u.sent) >= 0 for u in planned.predicted.devices.values())


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_a_plan_changed_by_hand_is_sensible_or_refused(tmp_path_factory, data, times):
    p, plan = two_stages()
    changed = plan.model_dump(mode="json")
    for _ in range(times):
        changed = mutated(changed, data.draw)
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_text(json.dumps(changed))
    try:
        again = Plan.load(path)
    except ContextLoRAError as e:
        place = r"stages\.[0-9]\.groups\.[0-9]\.group: ." if e.code == "E405" else "."
        assert re.match(rf"E(103|405) {re.escape(str(path))}.*({place}|version reads)", str(e), re.DOTALL)  # noqa: PT017
        return
    whole(again)
    if again.units == p.units and set(again.devices) <= set(p.fleet.devices):
        for g in (g.group for s in again.stages for g in s.groups):
            if g.cut <= p.work.lowest and set(g.tasks) <= set(p.loads):
                assert math.isfinite(simulate(p, [g], 1).seconds)


@pytest.mark.parametrize("seed", range(60))
def test_what_planners_write_is_read_again(seed, tmp_path):
    p, g = groups.draw(seed)
    plan = plan_of(p, [g])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.checked(lowest=p.work.lowest) is plan


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ((0, 1, "tasks"), ["t0"], r"stages\.0\.groups\.1\.group: task 't0' is trained twice"),
        ((1, 0, "tasks"), ["t2", "t2"], r"stages\.1\.groups\.0\.group: task 't2' is trained twice"),
        ((0, 1, "prefix", 0, "device"), "d1", r"stages\.0\.groups\.1\.group: device 'd1' works in two groups"),
        ((0, 0, "trainers", 1, "device"), "d0", r"stages\.0\.groups\.0\.group: a device is used twice"),
        ((0, 0, "trainers", 1, "start"), 4, r"stages\.0\.groups\.0\.group: trainers' units .* do not run from 0 to 6"),
        ((1, 0, "trainers", 0, "stop"), 5, r"stages\.1\.groups\.0\.group: with `data` every trainer"),
    ],
)
def test_the_error_says_where(place, value, says):
    data = two_stages()[1].model_dump(mode="json")
    stage, group, *path, last = place
    at(data["stages"][stage]["groups"][group]["group"], path)[last] = value
    with pytest.raises(PlanError, match=f"E405 plan.json, {says}"):
        Plan.model_validate_json(json.dumps(data)).checked("plan.json")


def test_a_prefix_may_not_reach_into_layers_that_train():
    plan = two_stages()[1]
    assert plan.checked(lowest=2) is plan
    with pytest.raises(
        PlanError, match=r"E405 stages\.0\.groups\.1\.group: the prefix ends at unit 2, and blocks begin"
    ):
        plan.checked(lowest=1)
