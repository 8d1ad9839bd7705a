"""The exact planner against every plan there is, one by one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from functools import cache

import pytest
import small

from contextlora.errors import PlanError
from contextlora.gear.cost import Problem, exchange, fits, predict
from contextlora.gear.exact import exact
from contextlora.gear.plan import Group, Part, check_group
from contextlora.gear.work import TaskLoad, Work

# --- brute force: shares nothing with the planner but the plan's form and what a plan costs --------------------------


def pipelines(devices, start, units):
    """Every pipeline of units [start, units) on all of these devices, in every order, with every cut."""
    for order in itertools.permutations(devices):
        for cuts in itertools.combinations(range(start + 1, units), len(order) - 1):
            ends = (start, *cuts, units)
            yield tuple(Part(device=d, start=a, stop=b) for d, a, b in zip(order, ends, ends[1:], strict=False))


def trained(devices, start, units, shared):
    """Every form on all of these devices: (form, trainers)."""
    for parts in pipelines(devices, start, units):
        yield ("single" if len(parts) == 1 else "pipeline"), parts
    if len(devices) > 1:  # on one medium all rings are alike
        for order in [devices] if shared else itertools.permutations(devices):
            yield "data", tuple(Part(device=d, start=start, stop=units) for d in order)


def groups(p, tasks, devices, sizes):
    """Every group that trains some tasks on exactly these devices."""
    shared, units = p.fleet.shared, p.units
    for k in (k for k in sizes if k <= len(tasks) * p.work.batch):
        for form, parts in trained(devices, 0, units, shared):
            one = {"tasks": tasks, "form": form, "trainers": parts, "size": k}
            yield Group(**one)
            if form != "data":
                for cut in range(1, min(p.work.lowest, parts[0].stop) + 1):
                    yield Group(**one, ahead="local", cut=cut, cache=True)
        for n in range(1, len(devices)):
            for ahead in itertools.combinations(devices, n):
                own = tuple(d for d in devices if d not in ahead)
                for cut in range(1, p.work.lowest + 1):
                    prefix = tuple(Part(device=d, start=0, stop=cut) for d in ahead)
                    for form, parts in trained(own, cut, units, shared):
                        one = {"tasks": tasks, "form": form, "trainers": parts, "size": k, "prefix": prefix, "cut": cut}
                        yield Group(**one, ahead="streamed")
                        if form != "data":
                            yield Group(**one, ahead="streamed", cache=True)


def divisions(tasks):
    """Every way to divide tasks among groups."""
    if not tasks:
        yield []
        return
    for n in range(len(tasks)):
        for others in itertools.combinations(tasks[1:], n):
            rest = [t for t in tasks[1:] if t not in others]
            for division in divisions(rest):
                yield [(tasks[0], *others), *division]


def brute(p, sizes):
    """The least seconds of any plan; inf where nothing fits."""
    names = tuple(p.fleet.devices)

    @cache
    def options(tasks, devices):
        """(seconds, air) of all groups that fit, without those that another one beats in both."""
        found = set()
        for g in groups(p, tasks, devices, sizes):
            check_group(g, p.units, p.work.lowest, p.fleet)
            predicted = predict(p, g)
            if fits(p, predicted):
                found.add((predicted.seconds, predicted.air))
        return [a for a in found if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in found)]

    def placed(division, free):
        """Every choice of groups: lists of (seconds, air)."""
        if not division:
            yield []
            return
        for n in range(1, len(free) + 1):
            for devices in itertools.combinations(free, n):
                for one in options(division[0], devices):
                    for rest in placed(division[1:], tuple(d for d in free if d not in devices)):
                        yield [one, *rest]

    total = 0.0
    for stage in p.work.stages:
        tasks = tuple(t.name for t in stage)
        best = math.inf
        for division in divisions(tasks):
            for chosen in placed(division, names):
                seconds = max(s for s, _ in chosen)
                best = min(best, max(seconds, sum(a for _, a in chosen)) if p.fleet.shared else seconds)
        total += best + exchange(p, tasks)
    return total


# --- random problems -------------------------------------------------------------------------------------------------


def drawn(seed):
    """A problem and sizes, small enough for brute force."""
    r = random.Random(seed)
    devices, tasks = r.choice([(1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 2), (3, 3)])
    units = r.randint(3, 6 if devices < 3 else 5)
    memory = r.choice([(60, 200), (60, 200), (30, 70), (15, 60)])
    shared = r.random() < 0.5
    rate = r.choice([(2e6, 40e6), (2e5, 4e6), (1e8, 1e9)])
    fleet = small.fleet(devices, seed=seed, memory=memory, shared=shared, rate=rate)
    same = r.random() < 0.4
    loads = [
        TaskLoad(f"t{i}", 8 if same else r.choice([5, 8, 12]), r.choice([4, 4, 400]), 4 + 4 * r.randint(0, 2))
        for i in range(tasks)
    ]
    cut = r.randint(0, tasks - 1) if r.random() < 0.4 else 0
    stages = tuple(tuple(s) for s in (loads[:cut], loads[cut:]) if s)
    work = Work(stages, r.choice([2, 3, 4]), r.choice([1, 2, 3]), r.randint(0, units - 2), units - 2)
    profiles = {d: small.profile(units, seed=seed, cut=r.choice([1e5, 1e6])) for d in fleet.devices}
    if r.random() < 0.3:  # measured on each device, as the bytes are not
        one = small.profile(units, seed=seed)
        profiles = {d: one.model_copy(update={"units": tuple(slower(u, r) for u in one.units)}) for d in fleet.devices}
    else:
        profiles = dict.fromkeys(fleet.devices, profiles[next(iter(fleet.devices))])
    return Problem(fleet, profiles, work), r.choice([(1, 2), (1, 2, 4), (2, 8), (3,)])


def slower(unit, r):
    by = r.uniform(0.5, 2)
    more = {what: tuple(by * t for t in getattr(unit, what)) for what in ("forward", "input_grad", "weight_grad")}
    return unit.model_copy(update=more)


def compare(seed):
    p, sizes = drawn(seed)
    expected = brute(p, sizes)
    if math.isinf(expected):
        with pytest.raises(PlanError, match="E406"):
            exact(p, sizes)
        return
    plan = exact(p, sizes)
    assert plan.seconds == pytest.approx(expected, rel=1e-9), seed
    valid(p, plan)


def valid(p, plan):
    """Groups that make sense, on devices of their own, within memory, with the numbers that `cost` gives."""
    for loads, stage in zip(p.work.stages, plan.stages, strict=True):
        used = [d for g in stage.groups for d in g.group.devices]
        assert len(used) == len(set(used))
        assert sorted(t for g in stage.groups for t in g.group.tasks) == sorted(t.name for t in loads)
        for g in stage.groups:
            check_group(g.group, p.units, p.work.lowest, p.fleet)
            assert g.predicted == predict(p, g.group)
            assert fits(p, g.predicted)
        seconds, air = max(g.predicted.seconds for g in stage.groups), sum(g.predicted.air for g in stage.groups)
        longest = max(seconds, air) if p.fleet.shared else seconds
        assert stage.seconds == pytest.approx(longest + stage.exchange)
        assert stage.exchange == exchange(p, [t.name for t in loads])
    assert plan.seconds == pytest.approx(sum(s.seconds for s in plan.stages))


@pytest.mark.parametrize("seed", range(150))
def test_no_plan_is_faster(seed):
    compare(seed)


@pytest.mark.slow
@pytest.mark.parametrize("tens", range(15, 100))
def test_no_plan_is_faster_on_a_thousand_problems(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        compare(seed)


@pytest.mark.parametrize("order", [("d0", "d1"), ("d1", "d0")])
def test_every_device_of_a_set_may_be_the_one_that_keeps_a_cache(order):
    p = small.problem(2, 6, 1, lowest=4, seed=7978)  # a pipeline behind a local prefix is best, on d0 first
    fleet = dataclasses.replace(p.fleet, devices={d: p.fleet.devices[d] for d in order})
    p = Problem(fleet, p.profiles, p.work)
    plan = exact(p, (1, 3))
    assert plan.seconds == pytest.approx(brute(p, (1, 3)), rel=1e-9)
    assert plan.stages[0].groups[0].group.devices == ("d0", "d1")


def crowded(seed):
    """Four devices, none with room for a whole task, on a medium so slow that two groups wait for one another."""
    r = random.Random(seed)
    memory, rate = r.choice([(20, 45), (25, 40), (30, 60)]), r.choice([(2e5, 2e6), (1e6, 8e6)])
    p = small.problem(4, r.choice([3, 3, 4]), 2, r.randint(0, 1), seed=seed)
    return Problem(small.fleet(4, seed=seed, memory=memory, rate=rate), p.profiles, p.work)


def compare_crowded(seed):
    """Returns whether the medium is what the plan waits for."""
    p = crowded(seed)
    plan = exact(p, (1, 2))
    assert plan.seconds == pytest.approx(brute(p, (1, 2)), rel=1e-9), seed
    valid(p, plan)
    (stage,) = plan.stages
    return stage.seconds - stage.exchange > max(g.predicted.seconds for g in stage.groups) * (1 + 1e-9)


def test_no_plan_is_faster_where_groups_wait_for_the_medium():
    assert sum(map(compare_crowded, range(8))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 100))
def test_no_plan_is_faster_where_groups_wait_for_the_medium_on_many_problems(seed):
    compare_crowded(seed)
