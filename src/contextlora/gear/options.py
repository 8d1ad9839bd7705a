"""All groups that may train some tasks: the fastest found for every set of devices, and bounds for those unexplored.

A *slot* is a kind of group whose air is known beforehand: form, micro-batches, number of stages and x (see
`pipelines`). For each slot and set of devices, the fastest group so far is kept. Pipelines are explored in *cells*,
ranges of tau: no pipeline of a cell is faster than the least fill for the upper end with the lower end as bottleneck,
as a group's seconds grow with both.

Prefixes need no search. Streamed: another device never makes the deal end later, and the same bytes go over the air,
so the best prefix of a group is all devices that it is given and that can hold it. Local: the later it ends, the more
a cache saves, with the same bytes kept, so it ends at the first trainer's end or at the lowest block. With one epoch a
cache saves nothing, so it is not considered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from contextlora.gear.pipelines import CACHED, WAITING, Pipelines, Probe
from contextlora.gear.rings import Rings
from contextlora.gear.tables import Array, Bytes, Case, Pace, Sets, bits, busy_all, deal_all
from contextlora.gear.work import TaskLoad

STREAMED = {"streamed": (False, WAITING), "cached": (True, CACHED)}


@dataclass(frozen=True)
class Slot:
    """A kind of group: "none", "local", "streamed" or "cached" pipelines (of one stage: single), or "data"."""

    k: int
    kind: str
    stages: int
    x: int


@dataclass
class Cell:
    """Pipelines of micro-batches of k whose tau is among taus[first : last + 1]; `lower` bounds them by slot and set.

    `probe` is of the highest tau, `below` of the one under the lowest.
    """

    k: int
    first: int
    last: int
    probe: Probe
    below: Probe | None
    lower: Array


@dataclass
class Rows:
    """Trainers that wait for a prefix: one a row; `low` and `high` bound their seconds in each run of steps."""

    slot: Array
    trainers: Array
    to: Array
    cut: Array
    air: Array
    low: Array
    high: Array
    tau: float = 0.0

    def pick(self, at: Array) -> Rows:
        """Some of them."""
        air, low, high = self.air[:, at], self.low[:, at], self.high[:, at]
        return Rows(self.slot[at], self.trainers[at], self.to[at], self.cut[at], air, low, high, self.tau)


@dataclass
class Prefixes:
    """Prefixes of k samples on all sets of devices, for each cut from 1 on.

    Attributes:
        each, arrives: seconds of a micro-batch, and until the first one arrives, by receiver, cut and device; inf where
            the device has no room for the prefix.
        member: of which set each device is, (sets, devices).
        tables: what `until` gives, by count, for all receivers, sets and cuts; None where few of them are asked for.
    """

    each: Array
    arrives: Array
    member: Array
    tables: dict[int | None, Array] | None = field(default_factory=dict)

    @classmethod
    def of(cls, size: Bytes, pace: Pace, sets: Sets, lowest: int) -> Prefixes:
        """Of a problem. On a shared medium, all receivers are alike and the axis has one entry."""
        own = pace.forward[:, 1 : lowest + 1].T  # (cuts, devices)
        fits = (size.needed((), pace.k, 0)[0, 1 : lowest + 1, None] <= size.room)[None]
        hop = pace.hop.T[:, None, :] if not pace.shared else np.full((1, 1, sets.devices), pace.medium)
        late = pace.late.T[:, None, :] if not pace.shared else np.full((1, 1, sets.devices), pace.late.max())
        slower = np.where(fits, np.maximum(own, hop), np.inf)
        return cls(slower, np.where(fits, own + hop + late, np.inf), sets.member)

    def mean(self, shares: Array, cut: int) -> Prefixes:
        """Those that end at one cut, where a receiver, a row of `shares`, is several devices at once, its columns."""

        def averaged(what: Array) -> Array:
            fits = np.isfinite(what[0, cut - 1])  # whoever receives
            mean = np.where(fits, shares @ np.where(fits, what[:, cut - 1], 0.0), np.inf)
            return np.broadcast_to(mean[:, None], (len(shares), *what.shape[1:]))

        return Prefixes(averaged(self.each), averaged(self.arrives), self.member, None)

    def until(self, count: int | None, to: Array, prefix: Array, cut: Array) -> Array:
        """Seconds until sets of devices are done with `count` micro-batches; None: until their first has arrived."""
        what = self.arrives if count is None else self.each
        if self.tables is None:
            return _until(count, np.where(self.member[prefix], what[to, cut], np.inf))
        if count not in self.tables:
            self.tables[count] = _until(count, np.where(self.member[:, None], what[:, None], np.inf))
        return self.tables[count][to, prefix, cut]


def _until(count: int | None, seconds: Array) -> Array:
    found: Array = seconds.min(-1) if count is None else busy_all(deal_all(count, seconds), seconds).max(-1)
    return found


class Options:
    """The groups that may train some tasks.

    Attributes:
        ring: seconds and air of an all-reduce, by set.
        slots, air: the slots, and seconds on a shared medium (0 on links) of a group in each.
        seconds: of the fastest group so far, by slot and set of devices that it may use.
        tau, cut, trainers: its threshold, the end of its prefix, its trainers.
    """

    def __init__(
        self,
        size: Bytes,
        paces: Sequence[Pace],
        sets: Sets,
        prefixes: Mapping[int, Prefixes],
        tasks: Sequence[TaskLoad],
        rings: Rings,
        whole: bool,
    ):
        self.sets, self.prefixes, self.rings, self.whole = sets, prefixes, rings, whole
        self.shared = size.problem.fleet.shared
        self.cases = {p.k: Case(size, p, tasks) for p in paces if p.k <= len(tasks) * size.problem.work.batch}
        self.pipelines = {k: Pipelines(case, sets) for k, case in self.cases.items()}
        self.slice = 4.0 * float(size.width[0, -1]) * sum(t.ranks for t in tasks)
        self.ring = np.array(
            [rings.best(m, self.slice)[:2] if m & (m - 1) else (0.0, 0.0) for m in range(sets.full + 1)]
        )
        epochs = size.problem.work.epochs
        self.lowest = min(size.problem.work.lowest, size.problem.units - 1)
        self.kinds = ["none", *(["streamed"] if self.lowest else []), *(["local", "cached"] if epochs > 1 else [])]
        self.kinds = [kind for kind in self.kinds if kind == "none" or self.lowest]
        self.slots: list[Slot] = []
        self.base: dict[tuple[int, str, int], int] = {}
        self.part: dict[int, slice] = {}
        for k in self.cases:
            self._add_slots(k)
        self.air = np.array([self._air(s) if self.shared else 0.0 for s in self.slots])
        shape = (len(self.slots), sets.full + 1)
        self.seconds, self.tau = np.full(shape, np.inf), np.zeros(shape)
        self.cut, self.trainers = np.zeros(shape, dtype=int), np.zeros(shape, dtype=int)

    def _add_slots(self, k: int) -> None:
        begin, devices = len(self.slots), self.sets.devices
        for n in range(1, devices + 1):
            for kind in self.kinds:
                self.base[k, kind, n] = len(self.slots)
                self.slots += [Slot(k, kind, n, x) for x in range(self.pipelines[k].width(n))]
            for kind in ("data", "data streamed")[: (n > 1) + (n > 1 and self.lowest > 0)]:
                self.base[k, kind, n] = len(self.slots)
                self.slots.append(Slot(k, kind, n, 0))
        self.part[k] = slice(begin, len(self.slots))

    def _air(self, s: Slot) -> float:
        case = self.cases[s.k]
        fresh = case.fresh[s.kind == "cached"] * case.pace.medium if "streamed" in s.kind or s.kind == "cached" else 0.0
        if s.kind.startswith("data"):
            own = self.ring[(1 << s.stages) - 1, 1] + 0.0 * case.micro
        else:
            own = case.micro * self.medium(s.k, s.stages)[s.x]
        return float((case.steps * (own + fresh)).sum())

    def able(self, k: int, prefix: int, cut: int) -> list[int]:
        """Devices of a prefix that can hold it."""
        return [d for d in bits(prefix) if np.isfinite(self.prefixes[k].each[0, cut - 1, d])]

    def medium(self, k: int, stages: int) -> Array:
        """Seconds that a micro-batch's hops occupy a shared medium, by x, hops without gradients; 0 on links."""
        x = np.arange(self.pipelines[k].width(stages))
        busy: Array = self.cases[k].pace.medium * (2 * (stages - 1) - x) if self.shared else 0.0 * x
        return busy

    def keep(self, slot: Array, mask: Array, seconds: Array, tau: Array | float, cut: Array, trainers: Array) -> None:
        """Notes groups, where faster than what was known; earlier ones on ties."""
        at = slot * (self.sets.full + 1) + mask
        better = np.flatnonzero(seconds < self.seconds.ravel()[at])
        better = better[np.lexsort((better, seconds[better], at[better]))]
        better = better[np.unique(at[better], return_index=True)[1]]
        for table, values in ((self.seconds, seconds), (self.tau, tau), (self.cut, cut), (self.trainers, trainers)):
            table.reshape(-1)[at[better]] = np.broadcast_to(values, at.shape)[better]
