"""Who talks to whom in a round: clusters, and the devices through which they exchange. No torch here."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

from contextlora.federated.channel import Channel
from contextlora.federated.cluster import Clustering, Member, cluster
from contextlora.federated.settings import Limits

Gateways = dict[tuple[int, int], tuple[str, str]]


class Planner:
    """Works each table out once: the devices of a simulation share one, since all would come to the same.

    Args:
        channel: what is planned over.
        limits: of clusters.
    """

    def __init__(self, channel: Channel, limits: Limits):
        self.channel, self.limits = channel, limits
        self.clusters = lru_cache(maxsize=4)(self._clusters)
        self.gateways = lru_cache(maxsize=4)(self._gateways)

    def _clusters(self, round_: int, table: frozenset[Member]) -> Clustering:
        return cluster(table, self.channel, self.limits, round_)

    def _gateways(self, round_: int, table: frozenset[Member]) -> Gateways:
        """For each ordered pair of clusters, the two devices that need the least power, then time, to talk."""
        groups, bits = self.clusters(round_, table).groups, {m.id: m.bits for m in table}

        def cost(pair: tuple[str, str]) -> tuple[float, float, tuple[str, str]]:
            power, seconds = self.channel.demands(round_, pair, [bits[n] for n in pair])
            return float(power[0]), float(seconds[0]), pair

        pairs = ((i, j) for i, j in product(range(len(groups)), repeat=2) if i != j)
        return {(i, j): min(product(groups[i], groups[j]), key=cost) for i, j in pairs}
