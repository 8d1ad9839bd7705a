"""What the exact planner looks up: seconds and bytes of every run of units on every device, and sets of devices.

The numbers are those of `cost`, laid out as arrays. A set of devices is a bit mask in declared order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from contextlora.gear.cost import AHEAD, HELD, LEARNING, QUEUE, TINY, Problem
from contextlora.gear.work import TaskLoad

Array = np.ndarray[Any, np.dtype[Any]]


class Sets:
    """All sets of D devices.

    Attributes:
        of_size: masks by number of devices.
        place: position of each mask among those of its size.
        big, small: all pairs with small a subset of big, sorted by big.
        begin: where each big one's pairs begin.
    """

    def __init__(self, devices: int):
        self.devices, self.full = devices, (1 << devices) - 1
        masks = np.arange(1 << devices)
        self.count = np.array([int(m).bit_count() for m in masks])
        self.of_size = [masks[self.count == n] for n in range(devices + 1)]
        self.place = np.zeros_like(masks)
        for found in self.of_size:
            self.place[found] = np.arange(len(found))
        inside = [np.array([s for s in range(m + 1) if s & m == s]) for m in range(1 << devices)]
        self.big = np.repeat(masks, [len(i) for i in inside])
        self.small = np.concatenate(inside)
        self.begin = np.concatenate([[0], np.cumsum([len(i) for i in inside])[:-1]])
        self.member = (masks[:, None] >> np.arange(devices)) & 1 == 1

    def add(self, size: int, device: int) -> tuple[Array, Array]:
        """Positions of the sets of `size` without a device, and of the same sets with it."""
        without = self.of_size[size][~self.member[self.of_size[size], device]]
        return self.place[without], self.place[without | 1 << device]

    def within(self, values: Array) -> Array:
        """The least value over all subsets of each set; sets are the last axis."""
        best: Array = values.copy()
        for d in range(self.devices):
            has = np.flatnonzero(self.member[:, d])
            best[..., has] = np.minimum(best[..., has], best[..., has ^ 1 << d])
        return best


class Bytes:
    """Bytes of every run of units [i, j), each (units, units + 1).

    They are whole numbers far below 2**53, so that sums in any order are exact and agree with `cost.memory_of`.
    """

    def __init__(self, problem: Problem):
        work, units = problem.work, problem.any_profile.units
        self.problem = problem
        trained = range(work.lowest, work.highest + 1)
        self.weights = _spans([u.weights for u in units])
        self.width = _spans([u.width if i in trained else 0 for i, u in enumerate(units)])
        self.saved = _spans([u.saved if i >= work.lowest else 0 for i, u in enumerate(units)])
        self.moment = np.zeros_like(self.saved)
        for i in range(len(units)):
            self.moment[i, i + 1 :] = list(accumulate((u.saved for u in units[i:]), max))
        devices = problem.fleet.devices.values()
        self.room = np.array([d.memory - d.reserved for d in devices])

    def needed(self, tasks: Sequence[TaskLoad], k: int, in_flight: int, kept: float = 0.0) -> Array:
        """Bytes beside `reserved` of a part [i, j) that trains `tasks`, or of a prefix where there are none."""
        learns = sum(t.ranks for t in tasks)
        held = max(0, max((t.active for t in tasks), default=0) - learns)
        moment = self.moment + self.problem.any_profile.cut
        blocks = self.width * (LEARNING * learns + HELD * held)
        needed: Array = self.weights + blocks + k * (in_flight * self.saved + moment) + kept
        return needed

    def reach(self, needed: Array) -> Array:
        """The last j for which [i, j) fits on each device, i where none does: (devices, units). Bytes grow with j."""
        n = len(needed)
        after = np.arange(n + 1) > np.arange(n)[:, None]
        fits = (needed <= self.room[:, None, None]) & after
        reached: Array = np.arange(n) + fits.sum(-1)
        return reached


def _spans(values: Sequence[float]) -> Array:
    ends = np.concatenate([[0.0], np.cumsum(values)])
    spans: Array = np.maximum(ends[None, :] - ends[:-1, None], 0.0)
    return spans


class Pace:
    """Seconds with micro-batches of k samples.

    Attributes:
        forward: of units [0, j), (devices, units + 1).
        both: forward and backward.
        hop, late: seconds that a micro-batch's hidden states take from device to device, and their delay.
        taus: all values that the slowest stage, or dedicated link, of a pipeline can have, ascending.
    """

    def __init__(self, problem: Problem, k: int):
        self.problem, self.k = problem, k
        names, ends = list(problem.fleet.devices), range(problem.units + 1)
        self.forward = np.array([[problem.forward(d, 0, j, k) for j in ends] for d in names])
        self.both = self.forward + np.array([[problem.backward(d, 0, j, k) for j in ends] for d in names])
        fleet, size = problem.fleet, problem.cut(k)
        self.hop = np.array([[fleet.airtime(a, b, size) for b in names] for a in names])
        self.late = np.array([[fleet.delay(a, b) for b in names] for a in names])
        self.shared = fleet.shared
        self.medium = float(self.hop.max()) if self.shared else 0.0  # one value for all pairs

    @cached_property
    def spans(self) -> Array:
        """Seconds of units [i, j) forward and backward, (devices, units, units + 1); negative where j < i."""
        spans: Array = self.both[:, None, :] - self.both[:, :-1, None]
        return spans

    @cached_property
    def taus(self) -> Array:
        """See the class."""
        n = self.spans.shape[1]
        after = np.arange(n + 1) > np.arange(n)[:, None]
        stages = self.spans[:, after].ravel()
        return np.unique(stages if self.shared else np.concatenate([stages, self.hop.ravel()]))

    def within(self, tau: float) -> Array:
        """The last j for which [i, j) takes at most tau on each device, (devices, units)."""
        n = self.spans.shape[1]
        after = np.arange(n + 1) > np.arange(n)[:, None]
        reached: Array = np.arange(n) + ((self.spans <= tau) & after).sum(-1)
        return reached


class Case:
    """Some tasks that train in one group with micro-batches of one size.

    Attributes:
        steps, micro: of every run of equal steps, n_r and M_r.
        fresh: by whether there is a cache, micro-batches of such a step that begin at the data, F_r.
        waiting, cached, ahead: bytes that a trainer keeps for a streamed prefix, for a cache, and of what runs ahead.
        full: micro-batches of a step in which all tasks are active.
    """

    def __init__(self, size: Bytes, pace: Pace, tasks: Sequence[TaskLoad]):
        self.bytes, self.pace, self.tasks, self.k = size, pace, tasks, pace.k
        problem = size.problem
        work, k = problem.work, pace.k
        runs = work.intervals(tasks)
        self.steps = np.array([n for n, _, _ in runs], dtype=float)
        self.micro = np.array([math.ceil(active * work.batch / k) for _, active, _ in runs])
        first = np.array([math.ceil(first * work.batch / k) for _, _, first in runs])
        self.fresh = {False: self.micro, True: np.minimum(first, self.micro)}
        self.waiting = QUEUE * problem.cut(k)
        self.ahead = AHEAD * problem.cut(k) if work.lowest else 0.0
        self.cached = problem.cut(1) * sum(t.samples for t in tasks)
        self.full = math.ceil(len(tasks) * work.batch / k)

        self._reach: dict[tuple[int, float], Array] = {}

    def reach(self, stages: int, kept: float = 0.0) -> Array:
        """How far a stage reaches that is the first of `stages`: in 1F1B it waits for that many backward passes."""
        key = (min(stages, self.full), kept)
        if key not in self._reach:
            self._reach[key] = self.bytes.reach(self.bytes.needed(self.tasks, self.k, *key))
        return self._reach[key]

    def seconds(self, fill: Array, rate: Array | float, stages: int) -> Array:
        """Seconds of all steps of pipelines."""
        each = [n * step(fill, rate, int(m), stages) for n, m in zip(self.steps, self.micro, strict=True)]
        total: Array = np.sum(each, axis=0)
        return total


def step(fill: Array, rate: Array | float, micro: int, stages: int) -> Array:
    """Seconds of a step of pipelines, the T of `cost`; it grows with fill and with rate."""
    total: Array = fill + (micro - 1) * rate
    if micro > stages:
        total += (micro - 1) // stages * np.maximum(0.0, fill - stages * rate)
    return total


def deal_all(count: int, seconds: Array) -> Array:
    """How many of `count` equal pieces workers on the last axis get, dealt as by `plan.deal`; of inf seconds: absent.

    Within T = count / sum(1 / seconds), no more than `count` pieces can be done, and the best deal takes no less: so
    every worker gets the floor(T / seconds) pieces that it finishes by then, and the few that are left go one by one.
    Where nobody is there, one piece waits for ever.
    """
    if count == 0:
        return np.zeros(seconds.shape)
    each = np.maximum(seconds, TINY).reshape(-1, seconds.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        least = count / (1 / each).sum(-1)
        absent = np.isinf(least)
        dealt = np.where(np.isinf(each) | absent[:, None], 0.0, np.floor(least[:, None] / each))
    left = np.where(absent, 1, count - dealt.sum(-1))
    rows = np.flatnonzero(left > 0)
    while len(rows):
        to = (each[rows] * (dealt[rows] + 1)).argmin(-1)
        dealt[rows, to] += 1
        left[rows] -= 1
        rows = rows[left[rows] > 0]
    counts: Array = dealt.reshape(seconds.shape)
    return counts


def busy_all(dealt: Array, seconds: Array) -> Array:
    """Seconds that workers need for what they were dealt, `seconds` for a piece; 0 for who is absent."""
    busy: Array = np.multiply(dealt, np.maximum(seconds, TINY), out=np.zeros(dealt.shape), where=dealt > 0)
    return busy


def bits(mask: int) -> list[int]:
    """Members of a set, in declared order."""
    return [d for d in range(mask.bit_length()) if mask >> d & 1]


def mask_of(members: Iterable[int]) -> int:
    """The set of some members."""
    return sum(1 << d for d in members)
