"""Who aggregates with whom: clusters under collision, power and delay (SO-LoRA section IV-C). No torch here.

Every device runs this on the same table of members and comes to the same clusters: members are sorted by id, ties go to
the lowest ids, and S, which decides the order of merges, is made of sums and products alone (`ExpectedCollisions`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from contextlora.errors import PeerError
from contextlora.federated.channel import Channel, within
from contextlora.federated.collisions import Bitmap, Collisions, ExpectedCollisions, Floats, MeasuredCollisions
from contextlora.federated.settings import Limits

MAX_BITS = 1 << 50


@dataclass(frozen=True)
class Member:
    """One row of the table that all devices share. Raises PeerError E642 for a row that cannot be.

    Attributes:
        id: the device's name.
        sparsity: s_l of each layer, 0 to 1: the share of B's positions that it trains and sends.
        bits: length of its encoded message.
        mask: its packed mask, as `MeasuredCollisions` takes it, where all devices know it; else empty.
        rates: bit/s to others, as it has measured them and told all.
    """

    id: str
    sparsity: tuple[float, ...]
    bits: int
    mask: bytes = b""
    rates: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.sparsity or not all(isinstance(s, int | float) and 0 <= s <= 1 for s in self.sparsity):
            raise PeerError("E642", "sparsity should be one number from 0 to 1 for each layer", where=self.id)
        if not isinstance(self.bits, int) or not 1 <= self.bits <= MAX_BITS:
            text = f"bits should be a whole number from 1 to 2^50, got {self.bits!r:.40}"
            raise PeerError("E642", text, where=self.id)


@dataclass(frozen=True)
class Refusal:
    """Why two clusters did not become one.

    Attributes:
        limit: the limit that would be exceeded: S_max, p_max or the deadline.
        at: the layer (from 0) whose collision rate, or the device whose power or delay, is the worst.
        value: what it would be: a rate, W or s.
        allowed: the limit.
        union: the members for whom `value` is. For power and delay these may be a part of the two clusters that
            had already been refused, as more members never need less.
    """

    limit: Literal["collision", "power", "delay"]
    at: int | str
    value: float
    allowed: float
    union: tuple[str, ...]

    def __str__(self) -> str:
        what, unit = {
            "collision": (f"S of layer {self.at}", ""),
            "power": (f"power of {self.at}", " W"),
            "delay": (f"delay of {self.at}", " s"),
        }[self.limit]
        return f"{', '.join(self.union)}: {what} would be {self.value:.4g}{unit}, at most {self.allowed:.4g}{unit}"


@dataclass(frozen=True)
class Clustering:
    """The clusters of a table.

    Attributes:
        groups: each cluster's member ids, sorted; clusters in the order of their first ids.
        collisions: max_l S_l of each cluster.
        refusals: for every pair of clusters, by their indices (a < b), what kept them apart.
    """

    groups: tuple[tuple[str, ...], ...]
    collisions: tuple[float, ...]
    refusals: Mapping[tuple[int, int], Refusal]

    def group_of(self, member: str) -> tuple[str, ...]:
        """The cluster that `member` is in. Raises PeerError E642."""
        for group in self.groups:
            if member in group:
                return group
        raise PeerError("E642", f"no '{member}' in this clustering")


def cluster(
    table: Iterable[Member],
    channel: Channel,
    limits: Limits,
    round_: int = 0,
    *,
    masks: Mapping[str, Bitmap] | None = None,
    sizes: Sequence[int] = (),
) -> Clustering:
    """Merges clusters, from single devices on, always the pair whose union collides least, until no union is allowed.

    A union is allowed if max_l S_l <= S_max and every member reaches all others with a power (eq. 25) of at most p_max
    within the deadline (eq. 8). Pairs with the same S go by their clusters' lowest ids.

    Args:
        table: the members, in any order.
        channel: says what reaching a group takes, and must never ask less for a larger one.
        limits: S_max, p_max and the deadline.
        round_: the round to plan for.
        masks: every member's packed mask (bytes,), once exchanged: collisions are then counted, not expected.
        sizes: with `masks`: positions in each layer.

    Raises: PeerError E641 for a member that the channel does not have, E642 for a table that cannot be.
    """
    members = _in_order(table)
    ids = [m.id for m in members]
    collisions: Collisions
    if masks is None:
        collisions = ExpectedCollisions(np.array([m.sparsity for m in members], float))
    else:
        if missing := [i for i in ids if i not in masks]:
            raise PeerError("E642", "no mask of this member", where=missing[0])
        collisions = MeasuredCollisions(np.stack([masks[i] for i in ids]), sizes)
    merging = _Merging(members, collisions, channel, limits, round_)
    merging.run()
    return merging.result()


def _in_order(table: Iterable[Member]) -> list[Member]:
    members = sorted(table, key=lambda m: m.id)
    if not members:
        raise PeerError("E642", "the table has no members")
    for a, b in pairwise(members):
        if a.id == b.id:
            raise PeerError("E642", "two rows of this member", where=a.id)
        if len(a.sparsity) != len(b.sparsity):
            raise PeerError("E642", f"{len(b.sparsity)} layers, but '{a.id}' has {len(a.sparsity)}", where=b.id)
    return members


class _Merging:
    """Clusters on their way, each known by the index of its first member."""

    def __init__(self, members: list[Member], collisions: Collisions, channel: Channel, limits: Limits, round_: int):
        self.members, self.collisions = members, collisions
        self.channel, self.limits, self.round = channel, limits, round_
        self.groups: dict[int, list[int]] = {i: [i] for i in range(len(members))}
        # A union that power or delay forbids is forbidden to all that grows from its parts: no need to ask again.
        self.refused: dict[int, dict[int, Refusal]] = {i: {} for i in self.groups}
        self.version = [0] * len(members)
        self.queue: list[tuple[float, int, int, int, int]] = []

    def run(self) -> None:
        """Merges until the queue holds no pair that is allowed."""
        for a in self.groups:
            self._offer(a, [b for b in self.groups if b > a])
        while self.queue:
            _, a, b, *versions = heapq.heappop(self.queue)
            if versions != [self.version[a], self.version[b]]:
                continue  # one of them has grown since
            if refusal := self._beyond_reach(a, b):
                self.refused[a][b] = self.refused[b][a] = refusal
            else:
                self._merge(a, b)

    def _offer(self, a: int, others: list[int]) -> None:
        """Queues `a` with each of `others` if collisions allow it."""
        worst = self.collisions.joined(a).max(axis=1)
        for b in others:
            if within(worst[b], self.limits.collision):
                low, high = min(a, b), max(a, b)
                heapq.heappush(self.queue, (float(worst[b]), low, high, self.version[low], self.version[high]))

    def _beyond_reach(self, a: int, b: int) -> Refusal | None:
        """The power or delay that forbids the union of two clusters, if one does."""
        union = [self.members[i] for i in sorted(self.groups[a] + self.groups[b])]
        ids = [m.id for m in union]
        power, seconds = self.channel.demands(self.round, ids, [m.bits for m in union])
        if not np.all(within(power, self.limits.power)):
            worst = int(power.argmax())
            return Refusal("power", ids[worst], float(power[worst]), self.limits.power, tuple(ids))
        if not np.all(within(seconds, self.limits.deadline)):
            worst = int(seconds.argmax())
            return Refusal("delay", ids[worst], float(seconds[worst]), self.limits.deadline, tuple(ids))
        return None

    def _merge(self, a: int, b: int) -> None:
        """Makes `a` (the lower) the union of both."""
        self.collisions.join(a, b)
        self.groups[a] = sorted(self.groups[a] + self.groups.pop(b))
        for other, refusal in self.refused.pop(b).items():
            del self.refused[other][b]
            self.refused[a].setdefault(other, refusal)
            self.refused[other][a] = self.refused[a][other]
        self.version[a], self.version[b] = self.version[a] + 1, -1
        self._offer(a, [c for c in self.groups if c != a and c not in self.refused[a]])

    def result(self) -> Clustering:
        """The clusters as they are now, and what keeps each pair apart."""
        heads, refusals, own = list(self.groups), dict[tuple[int, int], Refusal](), self.collisions.rates
        for i, a in enumerate(heads):
            joined = self.collisions.joined(a)
            for j in range(i + 1, len(heads)):
                b = heads[j]
                refusals[i, j] = self.refused[a].get(b) or self._too_alike(a, b, joined[b])
        groups = tuple(tuple(self.members[i].id for i in self.groups[a]) for a in heads)
        return Clustering(groups, tuple(float(own[a].max()) for a in heads), refusals)

    def _too_alike(self, a: int, b: int, rates: Floats) -> Refusal:
        ids = tuple(self.members[i].id for i in sorted(self.groups[a] + self.groups[b]))
        return Refusal("collision", int(rates.argmax()), float(rates.max()), self.limits.collision, ids)
