"""The analytic model against sums by hand."""

from __future__ import annotations

import pytest
import small

from contextlora.gear.cost import predict
from contextlora.gear.plan import Group, Part


def group(*trainers, form, **more):
    parts = tuple(Part(device=d, start=a, stop=b) for d, a, b in trainers)
    return Group(tasks=("t0", "t1"), form=form, trainers=parts, size=2, **more)


def test_one_device_computes_everything_one_after_another():
    p = small.problem(seed=1, units=5, lowest=2)
    work, prof = p.work, p.any_profile
    speed = p.fleet.devices["d0"].speed
    forward = sum(u.forward[1] for u in prof.units) / speed
    backward = sum(u.input_grad[1] + u.weight_grad[1] for u in prof.units[2:]) / speed
    got = predict(p, group(("d0", 0, 5), form="single"))
    micro = 2 * work.batch / 2
    assert got.step == pytest.approx(micro * (forward + backward))
    steps = [work.updates(t) * work.epochs for t in work.stages[0]]
    whole = sum(steps) * work.batch / 2 * (forward + backward)
    assert got.seconds == pytest.approx(whole)
    assert got.devices["d0"].busy == pytest.approx(whole)
    assert got.air == 0
