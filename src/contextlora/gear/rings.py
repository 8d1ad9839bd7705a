"""Rings for data parallelism: the order of some devices in which their slices' gradients are summed soonest."""

from __future__ import annotations

from contextlora.gear.fleet import Fleet
from contextlora.gear.tables import bits

Way = tuple[float, float, tuple[int, ...]]  # seconds a byte of the slowest link, the longest delay, devices in order


class Rings:
    """The best rings of every set of two or more devices.

    A ring takes rounds * (slowest hop + longest delay), so of all orders only those count that no other beats in both.
    On a shared medium all orders are alike, and the declared one is taken.
    """

    def __init__(self, fleet: Fleet):
        self.fleet, self.names = fleet, list(fleet.devices)
        self.found: dict[int, list[Way]] = {} if fleet.shared else self._search()

    def best(self, mask: int, size: float) -> tuple[float, float, tuple[int, ...]]:
        """Seconds and air of an all-reduce of `size` bytes, and the order. Mirrors `cost`."""
        members = tuple(bits(mask))
        n = len(members)
        if self.fleet.shared:
            a, b = self.names[members[0]], self.names[members[1]]
            each = n * self.fleet.airtime(a, b, size / n)
            return 2 * (n - 1) * (each + self.fleet.delay(a, b)), 2 * (n - 1) * each, members
        seconds, order = min((2 * (n - 1) * (size / n * slow + late), order) for slow, late, order in self.found[mask])
        return seconds, 0.0, order

    def _search(self) -> dict[int, list[Way]]:
        """Paths from the first member through sets of devices, kept while no other ends alike and beats them."""
        links, every = self._links(), range(len(self.names))
        paths: dict[tuple[int, int], list[Way]] = {(1 << d, d): [(0.0, 0.0, (d,))] for d in every}
        for mask in range(1, 1 << len(self.names)):
            first = (mask & -mask).bit_length()
            for last in bits(mask):
                here = paths[mask, last] = _unbeaten(paths.get((mask, last), []))
                for d in range(first, len(self.names)):  # beyond the first member: a ring begins anywhere
                    if not mask >> d & 1:
                        further = [_go(way, links[last, d], d) for way in here]
                        paths.setdefault((mask | 1 << d, d), []).extend(further)
        return {
            mask: _unbeaten([_close(way, links) for last in bits(mask) for way in paths[mask, last]])
            for mask in range(1, 1 << len(self.names))
            if mask.bit_count() > 1
        }

    def _links(self) -> dict[tuple[int, int], tuple[float, float]]:
        fleet = self.fleet
        return {
            (i, j): (fleet.airtime(a, b, 1.0), fleet.delay(a, b))
            for i, a in enumerate(self.names)
            for j, b in enumerate(self.names)
        }


def _go(way: Way, link: tuple[float, float], to: int) -> Way:
    return max(way[0], link[0]), max(way[1], link[1]), (*way[2], to)


def _close(way: Way, links: dict[tuple[int, int], tuple[float, float]]) -> Way:
    slow, late = links[way[2][-1], way[2][0]]
    return max(way[0], slow), max(way[1], late), way[2]


def _unbeaten(ways: list[Way]) -> list[Way]:
    kept: list[Way] = []
    for way in sorted(ways):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept
