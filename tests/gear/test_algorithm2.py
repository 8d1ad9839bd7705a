"""The paper's Algorithm 2: its two steps by hand, and never better than the exact planner."""

from __future__ import annotations

import itertools
import math

import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import PlanError
from contextlora.gear.algorithm2 import algorithm2
from contextlora.gear.cost import Problem, fits, predict
from contextlora.gear.exact import exact
from contextlora.gear.fleet import Fleet
from contextlora.gear.plan import check_group, deal
from contextlora.gear.work import TaskLoad, Work

ROOMY = (4000, 4001)


def only(plan):
    """The one group of a plan of one stage."""
    ((planned,),) = (s.groups for s in plan.stages)
    return planned.group


def seconds(p, device, start, stop, k):
    return p.forward(device, start, stop, k) + p.backward(device, start, stop, k)


@pytest.mark.parametrize("seed", range(20))
def test_groups_have_the_smallest_gap(seed):
    p = small.problem(3, 6, 2, lowest=3, seed=seed, memory=ROOMY)
    group, names = only(algorithm2(p, (1, 2))), list(p.fleet.devices)
    capacity = {d: 1 / seconds(p, d, 0, 6, 1) for d in names}
    every = sum(capacity.values())

    def gap(training, cut):
        has = sum(capacity[d] for d in training) / every
        needs = [1 - p.forward(d, 0, cut, 1) / seconds(p, d, 0, 6, 1) for d in names]
        asks = sum(needs) / len(needs)
        return abs(has - asks) + abs((1 - has) - (1 - asks))

    least = min(gap(t, c) for n in (1, 2) for t in itertools.combinations(names, n) for c in range(1, 4))
    assert gap([t.device for t in group.trainers], group.cut) == pytest.approx(least, abs=1e-9)
    assert {t.device for t in group.trainers} | {t.device for t in group.prefix} == set(names)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_layers_and_micro_batches_have_the_smallest_c(seed, shared):
    p = small.problem(3, 6, 2, lowest=3, seed=seed, memory=ROOMY, shared=shared)
    group = only(algorithm2(p, (1, 2, 4)))
    frozen, own = [t.device for t in group.prefix], [t.device for t in group.trainers]

    def hop(a, b, k):
        return p.fleet.airtime(a, b, p.cut(k)) + p.fleet.delay(a, b)

    def c(order, ends, k):
        sums = []
        for i, d in enumerate(order):
            further = (2 if p.returns(ends[i + 1]) else 1) * hop(d, order[i + 1], k) if i + 1 < len(order) else 0
            sums.append(seconds(p, d, ends[i], ends[i + 1], k) + further)
        micro = math.ceil(2 * p.work.batch / k)
        each = [p.forward(d, 0, group.cut, k) + hop(d, order[0], k) for d in frozen]
        ahead = max(n * s for n, s in zip(deal(micro, each), each, strict=True))
        return max(micro * max(sums), ahead)

    got = c(own, (group.cut, *(t.stop for t in group.trainers)), group.size)
    best = math.inf
    for k, order in itertools.product((1, 2, 4), itertools.permutations(own)):
        for cuts in itertools.combinations(range(group.cut + 1, 6), len(own) - 1):
            best = min(best, c(order, (group.cut, *cuts, 6), k))
    assert got == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([(20, 60), (60, 200), ROOMY]),
)
def test_it_is_never_better_than_the_exact_plan(seed, devices, tasks, lowest, shared, memory):
    p = small.problem(devices, 5, tasks, lowest, seed=seed, shared=shared, memory=memory)
    try:
        plan = algorithm2(p, (1, 2))
    except PlanError as e:
        assert e.code == "E406"  # noqa: PT017
        return
    assert exact(p, (1, 2)).seconds <= plan.seconds * (1 + 1e-12)
    for stage in plan.stages:
        for g in stage.groups:
            check_group(g.group, p.units, p.work.lowest, p.fleet)
            assert g.predicted == predict(p, g.group)
            assert fits(p, g.predicted)
    assert plan == algorithm2(p, (1, 2))


def test_without_frozen_units_all_devices_train():
    group = only(algorithm2(small.problem(3, 6, 2, lowest=0, memory=ROOMY)))
    assert (group.ahead, len(group.trainers), group.cut) == ("none", 3, 0)


def test_one_device_does_everything():
    group = only(algorithm2(small.problem(1, 6, 2, lowest=2, memory=ROOMY)))
    assert (group.ahead, group.form) == ("none", "single")


def test_nothing_fits():
    with pytest.raises(PlanError, match=r"E406.*'d[01]' lacks [0-9.]+ MB"):
        algorithm2(small.problem(2, 6, 2, memory=(10, 11)))


def test_eight_devices_and_a_large_model():
    names = [f"d{i}" for i in range(8)]
    fleet = Fleet.from_dict(
        {
            "devices": {n: {"memory": (150 + 30 * i) * 1e6, "speed": 1 / (1 + i / 4)} for i, n in enumerate(names)},
            "medium": {"rate": 1e8, "delay": 0.002},
        }
    )
    loads = tuple(TaskLoad(f"t{i}", 100, 8, 8) for i in range(3))
    p = Problem(fleet, dict.fromkeys(names, small.profile(44)), Work((loads,), 16, 3, 20, 42))
    assert set(only(algorithm2(p)).devices) == set(names)
