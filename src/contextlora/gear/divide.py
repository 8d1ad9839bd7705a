"""Divides a stage's tasks and the devices among groups, given the air that each possible group takes.

Tasks with equal loads cost alike, so that tasks are counted by load: (2, 1) is two of the first kind and one of the
second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from contextlora.gear.tables import Array, Sets, bits

Counts = tuple[int, ...]


def parts(total: Counts) -> list[Counts]:
    """Every part of some tasks but the empty one; parts of a part come before it."""
    return [c for c in itertools.product(*(range(n + 1) for n in total)) if any(c)]


def minus(total: Counts, part: Counts) -> Counts:
    """The other tasks."""
    return tuple(a - b for a, b in zip(total, part, strict=True))


def least_air(sets: Sets, total: Counts, groups: Mapping[Counts, Array]) -> dict[Counts, Array]:
    """The least air of each part of the tasks, by the devices that they may use; inf where there is no way.

    Args:
        groups: air of one group that trains some tasks, by the devices that it may use.
    """
    found: dict[Counts, Array] = {(0,) * len(total): np.zeros(sets.full + 1)}
    for part in parts(total):
        best = np.full(sets.full + 1, np.inf)
        for counts in _first_groups(part):
            sums = groups[counts][sets.small] + found[minus(part, counts)][sets.big ^ sets.small]
            best = np.minimum(best, np.minimum.reduceat(sums, sets.begin))
        found[part] = best
    return found


def fewest(sets: Sets, total: Counts, groups: Mapping[Counts, Array], air: float) -> list[tuple[Counts, int]]:
    """Tasks and devices of each group, where all take at most `air`: the fewest devices, then the earliest declared.

    Args:
        groups: air of one group that trains some tasks, by the devices that it is given.
    """
    shape = (sets.devices + 1, sets.full + 1)  # by the number of devices that may be used, and which
    found = {(0,) * len(total): np.zeros(shape)}
    for part in parts(total):
        best = np.full(shape, np.inf)
        for counts in _first_groups(part):
            for most in range(sets.devices + 1):
                sums = _sums(sets, groups[counts], found[minus(part, counts)], most, slice(None))
                best[most] = np.minimum(best[most], np.minimum.reduceat(sums, sets.begin))
        found[part] = best
    most, left, chosen = int(np.argmax(found[total][:, sets.full] <= air)), sets.full, []
    while any(total):
        ways = []
        pairs = slice(sets.begin[left], sets.begin[left] + (1 << left.bit_count()))
        for counts in _first_groups(total):
            sums = _sums(sets, groups[counts], found[minus(total, counts)], most, pairs)
            ways += [(bits(int(sets.small[pairs][i])), counts, float(sums[i])) for i in np.flatnonzero(sums <= air)]
        members, counts, _ = min(ways)
        mask = sum(1 << d for d in members)
        chosen.append((counts, mask))
        air -= float(groups[counts][mask])
        total, left, most = minus(total, counts), left ^ mask, most - len(members)
    return chosen


def _sums(sets: Sets, group: Array, rest: Array, most: int, pairs: slice) -> Array:
    """Air of a group on the small set of each pair and of the rest on what is left of the big one."""
    small, others = sets.small[pairs], sets.big[pairs] ^ sets.small[pairs]
    left = most - sets.count[small]
    sums: Array = np.where(left >= 0, group[small] + rest[np.maximum(left, 0), others], np.inf)
    return sums


def _first_groups(total: Counts) -> Iterator[Counts]:
    """What the next group may train: always some of the first kind left, so that no division is met in every order."""
    first = next(i for i, n in enumerate(total) if n)
    return (c for c in parts(total) if c[first])
