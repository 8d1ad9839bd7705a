"""The exact planner: plans make sense, do not depend on names, and are never slower where devices are better.

Small and large; against every plan there is: `test_exact`.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace

import groups
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import valid

from contextlora.errors import PlanError
from contextlora.gear.algorithm2 import algorithm2
from contextlora.gear.bound import least_seconds
from contextlora.gear.cost import Problem, exchange
from contextlora.gear.exact import exact
from contextlora.gear.fleet import Fleet
from contextlora.gear.simulate import simulated_seconds
from contextlora.gear.work import TaskLoad, Work

problems = st.builds(
    lambda seed, devices, units, tasks, lowest, shared, memory: small.problem(
        devices, units, tasks, min(lowest, units - 2), seed=seed, shared=shared, memory=memory
    ),
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(4, 9),
    st.integers(1, 3),
    st.integers(0, 7),
    st.booleans(),
    st.sampled_from([(20, 70), (60, 200)]),
)
SIZES = (1, 3)


def seconds(p):
    """inf where nothing fits."""
    try:
        return exact(p, SIZES).seconds
    except PlanError as e:
        assert e.code == "E406"  # noqa: PT017
        return math.inf


def on(p, change):
    """The same work on a changed fleet, given and returned as the contents of a fleet file."""
    f = p.fleet
    links = [
        {"between": list(pair), "rate": x.rate, "delay": x.delay} for pair, x in f.links.items() if pair[0] < pair[1]
    ]
    data = {"devices": {n: d.model_dump(exclude_none=True) for n, d in f.devices.items()}}
    fleet = Fleet.from_dict(change(data | ({"medium": f.medium.model_dump()} if f.shared else {"links": links})))
    return Problem(fleet, dict.fromkeys(fleet.devices, p.any_profile), p.work)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_plans_make_sense_and_are_the_same_again(p):
    if math.isfinite(seconds(p)):
        plan = exact(p, SIZES)
        valid(p, plan)
        assert plan == exact(on(p, lambda data: data), SIZES).model_copy(update={"fleet": plan.fleet})


@settings(max_examples=40, deadline=None)
@given(problems, st.randoms(use_true_random=False))
def test_names_and_order_of_devices_do_not_matter(p, r):
    names = list(p.fleet.devices)
    new = dict(zip(names, r.sample([f"n{i}" for i in range(len(names))], len(names)), strict=True))

    def renamed(data):
        links = [x | {"between": [new[n] for n in x["between"]]} for x in data.get("links", ())]
        devices = {new[n]: data["devices"][n] for n in r.sample(names, len(names))}
        return data | {"devices": devices} | ({"links": links} if links else {})

    q = on(p, renamed)
    without = [
        sum(exchange(x, [t.name for t in tasks]) for tasks in x.work.stages) for x in (p, q)
    ]  # goes by the order
    before, after = seconds(p) - without[0], seconds(q) - without[1]
    assert after == before or after == pytest.approx(before, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(problems, st.floats(1, 10), st.integers(0, 3), st.sampled_from(["memory", "speed", "rate"]))
def test_more_memory_speed_or_rate_is_never_slower(p, by, which, what):
    def better(data):
        if what != "rate":
            name = list(data["devices"])[which % len(data["devices"])]
            data["devices"][name][what] *= by
        elif "medium" in data:
            data["medium"]["rate"] *= by
        elif data["links"]:
            data["links"][which % len(data["links"])]["rate"] *= by
        return data

    assert seconds(on(p, better)) <= seconds(p) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(problems)
def test_another_device_is_never_slower(p):
    if p.fleet.shared:

        def more(data):
            return data | {"devices": data["devices"] | {"another": {"memory": 50e6, "speed": 0.5}}}

        q = on(p, more)
        names = [t.name for t in p.work.stages[0]]
        assert seconds(q) - exchange(q, names) <= (seconds(p) - exchange(p, names)) * (1 + 1e-9)


# --- a judge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_rivals_are_plans_of_other_kinds_and_the_judge_has_its_way(seed):
    p = groups.with_cut(small.problem(3, 6, 2, 2, seed=seed, shared=seed % 2 == 0), 5e6)
    met = []

    def last(_, stage):
        met.append(stage)
        return -len(met)

    judged, best = exact(p, SIZES, judge=last), exact(p, SIZES)
    assert met[0] == best.stages[0]
    assert judged.stages[0] == met[-1]
    assert [s.seconds for s in met] == sorted(s.seconds for s in met)
    assert len({repr([(g.group.form, g.group.ahead, g.group.size) for g in s.groups]) for s in met}) == len(met)
    for stage in met:
        valid(p, judged.model_copy(update={"stages": (stage,), "seconds": stage.seconds}))
    assert exact(p, SIZES, judge=lambda _, stage: stage.seconds) == best


def test_the_simulator_finds_better_plans_than_the_model_alone():
    """Where the closed form is off: few micro-batches, much to send."""
    gains = []
    for seed in (1, 4, 29, 57):
        p = groups.with_cut(small.problem(4, 7, 2, 2, seed=seed, batch=4), 1e7)
        alone, judged = (simulated_seconds(p, exact(p, (1, 2, 4), judge=j)) for j in (None, simulated_seconds))
        assert judged <= alone
        gains.append(alone / judged - 1)
    assert max(gains) > 0.01


# --- the rest --------------------------------------------------------------------------------------------------------


def test_devices_that_do_not_help_are_left_out():
    p = small.problem(3, 5, 1, lowest=2, memory=(500, 501))

    def slow(data):
        for name in ("d1", "d2"):
            data["devices"][name]["speed"] = 1e-6
        return data

    (stage,) = exact(on(p, slow)).stages
    assert stage.groups[0].group.devices == ("d0",)


def test_of_equal_devices_the_first_is_used():
    p = on(small.problem(3, 5, 1, lowest=0), lambda data: data | {"medium": {"rate": 1.0}})
    same = on(p, lambda data: data | {"devices": {n: {"memory": 1e9} for n in "bac"}})
    (stage,) = exact(same).stages
    assert stage.groups[0].group.devices == ("b",)


@pytest.mark.parametrize("seed", range(12))
def test_the_error_says_how_much_memory_would_do(seed):
    p = small.problem(2, 6, 2, seed=seed, memory=(20, 40))
    with pytest.raises(PlanError, match="E406") as caught:
        exact(p, (1, 2))
    lacking = re.findall(r"'(d\d)' lacks ([0-9.]+) MB", str(caught.value))
    assert lacking

    def given_it(data):
        for name, megabytes in lacking:
            data["devices"][name]["memory"] += float(megabytes) * 1.01e6
        return data

    assert math.isfinite(exact(on(p, given_it), (1, 2)).seconds)


def test_no_micro_batch_fits_the_step():
    with pytest.raises(PlanError, match=r"E406 t0: no micro-batch of 8, 16 samples is within a step of 4"):
        exact(small.problem(2, 5, 1, batch=4), (16, 8))


@pytest.mark.parametrize("shared", [True, False])
def test_of_more_devices_than_it_can_search_it_takes_the_fastest(monkeypatch, shared):
    p = small.problem(6, 5, 2, seed=3, shared=shared)
    order = sorted(p.fleet.devices, key=lambda d: (-p.fleet.devices[d].speed, -p.fleet.devices[d].memory))
    links = {pair: link for pair, link in p.fleet.links.items() if set(pair) <= {*order[:3]}}
    devices = {n: d for n, d in p.fleet.devices.items() if n in order[:3]}
    few = Problem(replace(p.fleet, devices=devices, links=links), {n: p.profiles[n] for n in devices}, p.work)
    want = exact(few, SIZES)
    monkeypatch.setattr("contextlora.gear.exact.MOST_DEVICES", 3)
    made = exact(p, SIZES)
    assert made.planner == "exact, on the 3 fastest of 6 devices"
    assert made.model_copy(update={"planner": "exact"}) == want
    assert least_seconds(p, SIZES) <= made.seconds


def test_where_the_fastest_are_too_small_it_takes_the_largest(monkeypatch):
    p = small.problem(5, 6, 1, seed=1, memory=(400, 500))
    fast = {
        f"d{i}": small.fleet(5, seed=1).devices["d0"].model_copy(update={"memory": 1e6, "speed": 9.0}) for i in (0, 2)
    }
    p = Problem(replace(p.fleet, devices={**p.fleet.devices, **fast}), p.profiles, p.work)
    monkeypatch.setattr("contextlora.gear.exact.MOST_DEVICES", 2)
    made = exact(p, SIZES)
    assert made.planner == "exact, on the 2 largest of 5 devices"
    assert {*made.devices} <= {"d1", "d3", "d4"}


@given(problems)
@settings(max_examples=25, deadline=None)
def test_no_plan_takes_less_than_the_bound(p):
    try:
        made = exact(p, SIZES)
    except PlanError:
        return
    given_away = sum(s.exchange for s in made.stages)
    assert least_seconds(p, SIZES) <= (made.seconds - given_away) * (1 + 1e-9)


def test_one_device_reaches_the_bound():
    p = small.problem(1, 6, 1, lowest=0, memory=(400, 500), epochs=1, batch=4)
    assert least_seconds(p, (4,)) == pytest.approx(exact(p, (4,)).seconds, rel=1e-12)


def test_too_many_devices_for_algorithm2():
    with pytest.raises(PlanError, match=r"E408.*2\^15.*exact"):
        algorithm2(small.problem(15, 5, 1))


def large(shared):
    """Eight devices, a model of 42 layers, three tasks with loads of their own."""
    r = random.Random(1)
    names = [f"d{i}" for i in range(8)]
    data = {"devices": {n: {"memory": r.uniform(150, 500) * 1e6, "speed": r.uniform(0.2, 1)} for n in names}}
    if shared:
        data["medium"] = {"rate": 1e8, "delay": 0.002}
    else:
        pairs = itertools.combinations(names, 2)
        data["links"] = [{"between": list(pair), "rate": r.uniform(2e7, 2e8), "delay": 0.002} for pair in pairs]
    fleet = Fleet.from_dict(data)
    loads = tuple(TaskLoad(f"t{i}", 300 + 100 * i, 8, 8) for i in range(3))
    profile = small.profile(44, seed=1, batches=(1, 2, 4, 8))
    return Problem(fleet, dict.fromkeys(names, profile), Work((loads,), 16, 3, 20, 42))


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_eight_devices_and_a_large_model(shared):
    p = large(shared)
    valid(p, exact(p))
