"""What a round is planned by: counted collisions where all masks are known, told rates, a word if nobody may meet."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from contextlora.federated.channel import RadioChannel
from contextlora.federated.cluster import Member
from contextlora.federated.planner import Planner
from contextlora.federated.settings import Limits, Radio
from contextlora.federated.trace import MeasuredChannel

NAMES = ["ant", "bee", "cat"]


def channel(limits, names=NAMES, **radio):
    return RadioChannel(names, Radio(radius=20.0, nearest=5.0, **radio), limits, run=1)


def table(sparsity, bits=10_000, masks=None, rates=None):
    return frozenset(
        Member(n, (s,), bits, (masks or {}).get(n, b""), tuple((rates or {}).get(n, {}).items()))
        for n, s in zip(NAMES, sparsity, strict=False)
    )


def planned(members, limits, round_=0, air=None, sizes=(), **radio):
    said = []
    planner = Planner(air or channel(limits, **radio), limits, say=said.append)
    return planner.clusters(round_, members, sizes), said, planner


def test_devices_that_may_not_meet_are_told_so_before_they_train():
    limits = Limits(collision=0.05)
    found, said, planner = planned(table((0.4, 0.3, 0.5)), limits)
    assert found.groups == (("ant",), ("bee",), ("cat",))
    (text,) = said
    assert "ant, bee: S of layer 0 would be 0.12, at most 0.05" in text, "the nearest pair"
    assert "raise limits.collision" in text
    planner.clusters(1, table((0.4, 0.3, 0.5)))
    assert len(said) == 1, "once"
    planner.clusters(2, table((0.4,)))
    assert len(said) == 1


def test_nothing_is_said_where_two_may_meet_or_nobody_else_is_there():
    assert planned(table((0.4, 0.3, 0.9)), Limits(collision=0.12))[1] == []
    assert planned(table((0.9,)), Limits(collision=0.0))[1] == []


@pytest.mark.parametrize(("limits", "what"), [({"power": 1e-12}, "power"), ({"deadline": 1e-9}, "delay")])
def test_the_limit_that_binds_is_named(limits, what):
    control = "full" if what == "delay" else "inversion"
    _, (text,), _ = planned(table((0.1, 0.1, 0.1)), Limits(collision=1.0, **limits), control=control)
    assert f"{what} of " in text
    assert "send less" in text


def test_the_default_lets_three_devices_with_a_tenth_of_smollm2_meet():
    """s of the densest layer, v_proj of SmolLM2's layer 26, as calibrated with `entropy` and a share of 0.1."""
    found, said, _ = planned(table((0.4355, 0.4349, 0.4355)), Limits())
    assert found.groups == (("ant", "bee", "cat"),)
    assert not said


def packed(*at, size=16):
    bits = np.zeros(size, np.uint8)
    bits[list(at)] = 1
    return np.packbits(bits).tobytes()


def test_collisions_are_counted_once_all_masks_are_known():
    """ant and bee share no position, ant and cat all of theirs; by chance alone all pairs would be the same."""
    limits, masks = Limits(collision=0.2), {"ant": packed(0, 1, 2, 3), "bee": packed(4, 5, 6, 7)}
    masks["cat"] = masks["ant"]
    found, _, _ = planned(table([0.25] * 3, masks=masks), limits, sizes=(16,))
    assert found.groups == (("ant", "bee"), ("cat",))
    assert found.collisions == (0.0, 0.0)
    assert found.refusals[0, 1].value == 4 / 16
    less = {k: v for k, v in masks.items() if k != "cat"}
    found, _, _ = planned(table([0.25] * 3, masks=less), limits, sizes=(16,))
    assert found.groups == (("ant", "bee", "cat"),), "one mask is not known: eq. 19 for all"
    assert found.collisions[0] == pytest.approx(3 * 0.25**2 * 0.75 + 0.25**3)


def test_clusters_follow_the_rates_that_were_told():
    limits = Limits(collision=1.0, deadline=2.0)
    fast = {a: {b: 10_000_000 for b in NAMES if b != a} for a in NAMES}
    slow = {**fast, "cat": {"ant": 10_000_000, "bee": 100}}  # 10 kbit take 100 s
    for rates, groups in ((fast, 1), (slow, 2)):
        found, _, planner = planned(table([0.1] * 3, rates=rates), limits, control="full")
        assert len(found.groups) == groups
        told = MeasuredChannel(NAMES, limits)
        for a, b in permutations(NAMES, 2):
            told.record(0, a, b, rates[a][b])
        want = Planner(told, limits).clusters(0, table([0.1] * 3))
        assert found.groups == want.groups
        assert planner.gateways(0, table([0.1] * 3, rates=rates)).keys() == {
            (i, j) for i in range(groups) for j in range(groups) if i != j
        }


def test_a_link_that_nobody_has_measured_is_taken_from_the_channel():
    limits = Limits(collision=1.0, deadline=1.0)
    air = MeasuredChannel(NAMES, limits)
    for a, b in permutations(NAMES, 2):
        air.record(0, a, b, 0.0 if "cat" in (a, b) else 1e6)
    found, _, _ = planned(table([0.1] * 3, rates={"ant": {"cat": 10**6}}), limits, air=air)
    assert found.groups == (("ant", "bee"), ("cat",)), "cat has told nothing of its own links"
    rates = {"ant": {"cat": 10**6}, "bee": {"cat": 10**6}, "cat": {"ant": 10**6, "bee": 10**6}}
    found, _, _ = planned(table([0.1] * 3, rates=rates), limits, air=air)
    assert found.groups == (("ant", "bee", "cat"),)


def test_what_can_be_counted_on_is_exceeded_but_for_outage():
    radio, limits = Radio(control="full", outage=0.2), Limits()
    air = RadioChannel(NAMES, radio, limits, run=3)
    below = [air.rate(r, "ant", "bee") < air.expected_rate(r, "ant", "bee") for r in range(2000)]
    assert abs(np.mean(below) - 0.2) < 4 * (0.2 * 0.8 / 2000) ** 0.5
