"""Who talks to whom in a round: clusters, and the devices through which they exchange. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import permutations, product

import numpy as np

from contextlora.federated.channel import Channel
from contextlora.federated.cluster import Clustering, Member, cluster
from contextlora.federated.settings import Cast, Limits
from contextlora.federated.trace import MeasuredChannel

Gateways = dict[tuple[int, int], tuple[str, str]]
Table = frozenset[Member]
REMEDIES = {
    "collision": "raise limits.collision, or lower slices.share",
    "power": "raise limits.power or limits.deadline, or send less",
    "delay": "raise limits.deadline, or send less",
}


class Planner:
    """Works each table out once: the devices of a simulation share one, since all would come to the same.

    Args:
        channel: what is planned over.
        limits: of clusters.
        cast: how a device sends, where it is told rates that are planned over.
        say: told once why no two devices come together, if so it is.
    """

    def __init__(
        self,
        channel: Channel,
        limits: Limits,
        cast: Cast = "unicast",
        say: Callable[[str], None] = lambda _: None,
    ):
        self.channel, self.limits, self.cast, self.say = channel, limits, cast, say
        self.clusters = lru_cache(maxsize=4)(self._clusters)
        self.gateways = lru_cache(maxsize=4)(self._gateways)
        self._air = lru_cache(maxsize=4)(self._as_told)
        self._said = set[tuple[str, bool]]()

    def _clusters(self, round_: int, table: Table, sizes: tuple[int, ...] = ()) -> Clustering:
        """The clusters of a table: by counted collisions if all of it have a mask, else by expected ones (eq. 19).

        Args:
            sizes: positions in each layer, of the masks.
        """
        counted = bool(sizes) and all(m.mask for m in table)
        masks = {m.id: np.frombuffer(m.mask, np.uint8) for m in table} if counted else None
        found = cluster(table, self._air(round_, table), self.limits, round_, masks=masks, sizes=sizes)
        if len(found.groups) == len(table) > 1:
            self._warn(round_, found, counted)
        return found

    def _warn(self, round_: int, found: Clustering, counted: bool) -> None:
        nearest = min(found.refusals.values(), key=lambda r: r.value / r.allowed if r.allowed else np.inf)
        if (nearest.limit, counted) not in self._said:
            self._said.add((nearest.limit, counted))
            text = f"in round {round_} no two devices may be in one cluster; nearest to it are {nearest}"
            self.say(f"{text}; {REMEDIES[nearest.limit]}")

    def _gateways(self, round_: int, table: Table, sizes: tuple[int, ...] = ()) -> Gateways:
        """For each ordered pair of clusters, the two devices that need the least power, then time, to talk."""
        groups, bits = self.clusters(round_, table, sizes).groups, {m.id: m.bits for m in table}
        air = self._air(round_, table)

        def cost(pair: tuple[str, str]) -> tuple[float, float, tuple[str, str]]:
            power, seconds = air.demands(round_, pair, [bits[n] for n in pair])
            return float(power[0]), float(seconds[0]), pair

        pairs = ((i, j) for i, j in product(range(len(groups)), repeat=2) if i != j)
        return {(i, j): min(product(groups[i], groups[j]), key=cost) for i, j in pairs}

    def _as_told(self, round_: int, table: Table) -> Channel:
        """The channel, or if anybody has told rates: those, and the channel's own for links nobody has measured."""
        told = {(m.id, other): rate for m in table for other, rate in m.rates}
        if not told:
            return self.channel
        names = sorted(m.id for m in table)
        air = MeasuredChannel(names, self.limits, self.cast)
        for a, b in permutations(names, 2):
            rate = told[a, b] if (a, b) in told else self.channel.expected_rate(round_, a, b)
            air.record(round_, a, b, rate)
        return air
