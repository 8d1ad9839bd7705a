"""Clusters keep every limit, are the same for everyone, and are those that the paper's greedy rule would make."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from contextlora.errors import PeerError
from contextlora.federated.channel import RadioChannel
from contextlora.federated.cluster import MAX_BITS, Member, Refusal, cluster
from contextlora.federated.settings import Limits, Radio
from contextlora.federated.trace import MeasuredChannel

UNIT = 16  # sparsity in sixteenths: S is then a whole number over 16^n, so that ties and limits are met exactly
LOOSE = Limits(collision=1.0)


def fleet(seed: int, most: int = 9) -> tuple[list[Member], RadioChannel, Limits]:
    """A random table, its channel and limits, of which now one and now another binds."""
    rng = np.random.default_rng(seed)
    ids = [f"d{i}" for i in rng.permutation(20)[: rng.integers(1, most + 1)]]
    layers = int(rng.integers(1, 4))
    table = [
        Member(i, tuple((rng.integers(0, 7, layers) / UNIT).tolist()), int(rng.integers(10**6, 2 * 10**7))) for i in ids
    ]
    collision, deadline, power = rng.integers(0, 13) / UNIT, rng.uniform(1, 4), rng.uniform(0.05, 0.5)
    limits = Limits(collision=float(collision), deadline=float(deadline), power=float(power))
    radio = Radio(
        radius=float(rng.uniform(50, 500)),
        cast=str(rng.choice(["unicast", "broadcast"])),
        control=str(rng.choice(["inversion", "full"])),
        step=float(rng.choice([0, 10])),
    )
    return table, RadioChannel(ids, radio, limits, seed), limits


class Oracle:
    """The limits of a set of members, from the printed equations, in whole numbers and with scalars."""

    def __init__(self, table, channel, limits, round_):
        self.members, self.limits, self.radio = {m.id: m for m in table}, limits, channel.radio
        self.at = dict(zip(channel.devices, channel.positions(round_), strict=True))

    def collision(self, group) -> float:
        worst = 0
        for shares in zip(*(self.members[i].sparsity for i in group), strict=True):
            k = [round(s * UNIT) for s in shares]
            none = math.prod(UNIT - x for x in k)
            one = sum(x * math.prod(UNIT - z for j, z in enumerate(k) if j != i) for i, x in enumerate(k))
            worst = max(worst, UNIT ** len(k) - none - one)
        return worst / UNIT ** len(group)

    def gain(self, a, b) -> float:
        km = max(math.dist(self.at[a], self.at[b]), self.radio.nearest) / 1000
        return 10 ** (-(128.1 + 37.6 * math.log10(km)) / 10) * -math.log(1 - self.radio.outage)

    def reach(self, group) -> tuple[float, float]:
        """The largest power (W) and delay (s) of any member of a group."""
        noise, power, seconds = 10 ** ((-174 + 9) / 10) / 1000, 0.0, 0.0
        n = 1 if self.radio.cast == "broadcast" else len(group) - 1
        band = self.radio.bandwidth / n
        for i in group:
            bits, each = self.members[i].bits, []
            for j in set(group) - {i}:
                if self.radio.control == "inversion":
                    each.append(noise * band / self.gain(i, j) * (2 ** (bits / (band * self.limits.deadline)) - 1))
                else:
                    snr = self.limits.power / n * self.gain(i, j) / (noise * band)
                    seconds = max(seconds, bits / (band * math.log2(1 + snr)))
            power = max([power, max(each, default=0) if n == 1 else sum(each)])
        return power, seconds

    def verdict(self, group) -> str:
        """The limit that forbids a cluster, or an empty string."""
        if self.collision(group) > self.limits.collision:
            return "collision"
        power, seconds = self.reach(group)
        if power > self.limits.power * (1 + 1e-8):
            return "power"
        return "delay" if seconds > self.limits.deadline * (1 + 1e-8) else ""

    def greedy(self) -> tuple[tuple[str, ...], ...]:
        """Always the allowed union of lowest S; among equals that of the lowest first ids."""
        groups = [(i,) for i in sorted(self.members)]
        while True:
            unions = ((self.collision(a + b), a, b) for a, b in combinations(groups, 2))
            best = min((u for u in unions if not self.verdict(u[1] + u[2])), default=None)
            if best is None:
                return tuple(groups)
            _, a, b = best
            groups = sorted([g for g in groups if g not in (a, b)] + [tuple(sorted(a + b))])


def test_500_fleets_keep_every_limit_and_equal_the_greedy_rule():
    bound, sizes = Counter[str](), Counter[int]()
    for seed in range(500):
        table, channel, limits = fleet(seed)
        oracle, found = Oracle(table, channel, limits, seed % 4), cluster(table, channel, limits, seed % 4)
        assert sorted(i for g in found.groups for i in g) == sorted(m.id for m in table)
        assert found.groups == oracle.greedy()
        for group, rate in zip(found.groups, found.collisions, strict=True):
            sizes[len(group)] += 1
            if len(group) > 1:
                assert oracle.verdict(group) == ""
                assert rate == oracle.collision(group)
        for (a, b), refusal in found.refusals.items():
            bound[refusal.limit] += 1
            union = set(found.groups[a] + found.groups[b])
            assert set(refusal.union) <= union
            assert refusal.allowed == (limits.deadline if refusal.limit == "delay" else getattr(limits, refusal.limit))
            assert refusal.value > refusal.allowed
            if refusal.limit == "collision":
                assert set(refusal.union) == union
                assert refusal.value == oracle.collision(refusal.union)
            else:
                worst = oracle.reach(refusal.union)[refusal.limit == "delay"]
                assert refusal.value == pytest.approx(worst, rel=1e-9)
                assert refusal.at in refusal.union
        assert len(found.refusals) == math.comb(len(found.groups), 2)
    assert min(bound[limit] for limit in ("collision", "power", "delay")) > 100
    assert all(sizes[n] > 10 for n in range(1, 6))


def test_500_permuted_tables_give_identical_clusters():
    for seed in range(500):
        table, channel, limits = fleet(seed)
        order = np.random.default_rng(seed).permutation(len(table))
        devices = [channel.devices[i] for i in order[::-1]]
        other = RadioChannel([*devices, "stranger"], channel.radio, limits, seed)
        assert cluster([table[i] for i in order], other, limits, 1) == cluster(table, channel, limits, 1)


def test_another_process_makes_the_same_clusters():
    code = """
import json, sys
from contextlora.federated.channel import RadioChannel
from contextlora.federated.cluster import Member, cluster
from contextlora.federated.settings import Limits, Radio
ids = [f"d{i}" for i in range(40)][::-1]
limits = Limits(collision=0.1)
table = [Member(i, (0.02 + int(i[1:]) / 400, 0.1), 12_000_000) for i in ids]
print(json.dumps([cluster(table, RadioChannel(ids, Radio(radius=400.0), limits, "x"), limits).groups]))
"""
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    ids, limits = [f"d{i}" for i in range(40)], Limits(collision=0.1)
    table = [Member(i, (0.02 + int(i[1:]) / 400, 0.1), 12_000_000) for i in ids]
    here = cluster(table, RadioChannel(ids, Radio(radius=400.0), limits, "x"), limits).groups
    assert 4 < len(here) < 40
    assert json.loads(printed) == [[list(g) for g in here]]


def test_ties_go_to_the_lowest_ids():
    ids = ["e", "b", "a", "d", "c"]
    table, limits = [Member(i, (0.25,), 1000) for i in ids], Limits(collision=0.0625)
    assert cluster(table, RadioChannel(ids, Radio(), limits), limits).groups == (("a", "b"), ("c", "d"), ("e",))


def test_the_lowest_collision_goes_first_not_the_nearest():
    table = [Member("a", (0.5, 0.1), 1000), Member("b", (0.5, 0.1), 1000), Member("c", (0.1, 0.5), 1000)]
    limits = Limits(collision=0.1)
    found = cluster(table, RadioChannel("abc", Radio(), limits), limits)
    assert found.groups == (("a", "c"), ("b",))
    assert found.collisions == (pytest.approx(0.05), 0.0)
    assert found.group_of("c") == ("a", "c")
    refusal = found.refusals[0, 1]
    assert (refusal.limit, refusal.at, refusal.union) == ("collision", 0, ("a", "b", "c"))
    assert str(refusal) == "a, b, c: S of layer 0 would be 0.3, at most 0.1"


def test_refusals_name_device_value_and_limit():
    air, table = MeasuredChannel(["a", "b"], LOOSE), [Member(i, (0.1,), 8_000_000) for i in "ab"]
    air.record(0, "a", "b", 1e7)
    air.record(0, "b", "a", 2e6)
    assert str(cluster(table, air, LOOSE).refusals[0, 1]) == "a, b: delay of b would be 4 s, at most 2 s"
    weak = LOOSE.model_copy(update={"power": 1e-12})
    refusal = cluster(table, RadioChannel("ab", Radio(), weak, 0), weak).refusals[0, 1]
    assert refusal.limit == "power"
    assert str(refusal).startswith("a, b: power of a would be ")
    assert str(refusal).endswith(" W, at most 1e-12 W")


def test_a_message_too_long_for_any_power_is_refused_not_a_crash():
    table = [Member(i, (0.1,), MAX_BITS) for i in "ab"]
    found = cluster(table, RadioChannel("ab", Radio(), LOOSE), LOOSE)
    assert found.refusals[0, 1] == Refusal("power", "a", math.inf, 0.2, ("a", "b"))


def test_masks_once_known_are_counted():
    """Expected S of two at s = 0.5 is 0.25; these masks meet nowhere, or everywhere."""
    table = [Member(i, (0.5,), 1000) for i in "abcd"]
    low, high = np.packbits([1] * 8 + [0] * 8), np.packbits([0] * 8 + [1] * 8)
    masks, limits = {"d": high, "a": low, "c": low, "b": high}, Limits(collision=0.0)
    channel = RadioChannel("abcd", Radio(), limits)
    assert len(cluster(table, channel, limits).groups) == 4
    found = cluster(table, channel, limits, masks=masks, sizes=[16])
    assert (found.groups, found.collisions) == ((("a", "b"), ("c", "d")), (0.0, 0.0))
    assert found.refusals[0, 1].value == 1.0
    with pytest.raises(PeerError, match="E642 c: no mask of this member"):
        cluster(table, channel, limits, masks={"a": low, "b": low}, sizes=[16])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "E642 the table has no members"),
        ([("a", (0.1,), 8), ("a", (0.2,), 8)], "E642 a: two rows of this member"),
        ([("a", (0.1,), 8), ("b", (0.1, 0.1), 8)], "E642 b: 2 layers, but 'a' has 1"),
        ([("a", (), 8)], "E642 a: sparsity should be one number from 0 to 1 for each layer"),
        ([("a", (0.1, 1.5), 8)], "E642 a: sparsity should be"),
        ([("a", (float("nan"),), 8)], "E642 a: sparsity should be"),
        ([("a", (0.1,), 0)], r"E642 a: bits should be a whole number from 1 to 2\^50, got 0"),
        ([("a", (0.1,), 8.0)], "E642 a: bits should be"),
        ([("a", (0.1,), 1 << 60)], "E642 a: bits should be"),
        ([("a", (0.1,), 8), ("x", (0.1,), 8)], "E641 no device 'x' in this channel"),
    ],
)
def test_tables_that_cannot_be_are_refused(rows, said):
    with pytest.raises(PeerError, match=said):
        cluster([Member(*row) for row in rows], RadioChannel("abc", Radio(), LOOSE), LOOSE)


@pytest.mark.parametrize(
    ("radius", "collision", "cast"), [(200.0, 0.05, "unicast"), (3000.0, 0.2, "unicast"), (1000.0, 1.0, "broadcast")]
)
def test_200_devices_of_210_layers_take_less_than_two_seconds(radius, collision, cast):
    ids, rng = [f"d{i}" for i in range(200)], np.random.default_rng(0)
    table, limits = [Member(i, tuple(rng.uniform(0, 0.2, 210)), 16_000_000) for i in ids], Limits(collision=collision)
    start = time.process_time()
    found = cluster(table, RadioChannel(ids, Radio(radius=radius, cast=cast), limits), limits)
    assert time.process_time() - start < 2
    assert 1 < len(found.groups) < 200
