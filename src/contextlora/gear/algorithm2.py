"""The paper's planner: Algorithm 2 of ContextLoRA and ContextGear, read literally.

First D_t and V_t, which minimise the computational gap of eq. 8, then Q and k, which minimise C of eq. 11. What the
paper leaves open, and what is done here:

* V: every task of a stage trains, and what is frozen for all of them are the units below the lowest block. The text
  under eq. 8 gives part of the frozen forward pass to D_t "adaptively": so V_t is the cut, from which on units are
  D_t's. The share it may have ends before all of it: with nothing left for D_f the gap would always be zero.
* R_c: a device's capacity is one over its seconds for the whole model with the smallest micro-batch; groups have
  shares of all devices' sum. R_r: shares of the seconds of that work, averaged over devices.
* Memory: the paper's steps do not look at it. Here, the groups of the smallest gap for which some Q and k fit are
  taken; if there are none, D_t is all devices and D_f empty, as where nothing is frozen.
* Q_t: contiguous layers for every device of D_t, in the best order. Q_f: each device of D_f holds all units below the
  cut and takes whole micro-batches, as our plans say.
* C_T, C_F (eqs. 9, 10): of a whole step, as those of one micro-batch would always choose k = 1. The maximum is over
  devices: seconds of their layers and of the hop to the next device, both ways if gradients return.
* All tasks of a stage train together, and nothing is cached: the paper knows neither other division nor a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from contextlora.errors import PlanError
from contextlora.gear.cost import Problem, exchange, predict, together
from contextlora.gear.plan import Group, Part, Plan, PlannedGroup, PlannedStage, deal
from contextlora.gear.shortfall import nothing_fits
from contextlora.gear.tables import Array, Bytes, Case, Pace, bits
from contextlora.gear.work import TaskLoad

MOST_DEVICES = 14
Stages = list[tuple[int, int, int]]  # device, start, stop
Split = tuple[float, Stages]  # C and Q_t


def algorithm2(problem: Problem, sizes: Sequence[int] = (1, 2, 4, 8)) -> Plan:
    """Plans a training by Algorithm 2.

    Args:
        sizes: of micro-batches, k, to choose from.

    Raises:
        PlanError: E406 where no grouping fits the devices' memory, E408 for more devices than can be grouped.
    """
    if (count := len(problem.fleet.devices)) > MOST_DEVICES:
        text = f"algorithm2 goes through all 2^{count} groups of devices; give it at most {MOST_DEVICES}, or use exact"
        raise PlanError("E408", text)
    stages = tuple(_stage(problem, tasks, sorted(set(sizes))) for tasks in problem.work.stages)
    synthetic = problem.fleet.synthetic or any(p.synthetic for p in problem.profiles.values())
    return Plan(
        planner="algorithm2",
        fleet=problem.fleet.name,
        model=problem.any_profile.model,
        units=problem.units,
        stages=stages,
        seconds=sum(s.seconds for s in stages),
        synthetic=synthetic,
    )


def _stage(problem: Problem, tasks: Sequence[TaskLoad], sizes: Sequence[int]) -> PlannedStage:
    names = tuple(t.name for t in tasks)
    size, step = Bytes(problem), len(tasks) * problem.work.batch
    cases = [Case(size, Pace(problem, k), tasks) for k in sizes if k <= step]
    if cases:
        splits = {case.k: _Splits(case) for case in cases}
        for training, cut in _groupings(problem, cases[0].pace):
            found = [(split[0], k, split) for k, s in splits.items() if (split := s.best(training, cut)) is not None]
            if found:
                _, k, (_, q) = min(found, key=lambda f: f[:2])
                group = _group(problem, names, training, cut, k, q)
                predicted = predict(problem, group)
                given = exchange(problem, names)
                planned = PlannedGroup(group=group, predicted=predicted)
                return PlannedStage(groups=(planned,), exchange=given, seconds=together(problem, [predicted]) + given)
    raise nothing_fits(problem, tasks, sizes)


def _groupings(problem: Problem, pace: Pace) -> Iterator[tuple[int, int]]:
    """D_t and the cut, by the gap G_c of eq. 8; larger D_f cuts and earlier devices first on ties."""
    every = (1 << len(pace.both)) - 1
    lowest = min(problem.work.lowest, problem.units - 1)
    seconds = np.maximum(pace.both[:, -1], 1e-30)
    capacity = 1 / seconds / (1 / seconds).sum()
    gaps = []
    for cut in range(1, lowest + 1):
        frozen = float((pace.forward[:, cut] / seconds).mean())
        for training in range(1, every):
            share = float(capacity[bits(training)].sum())
            gap = abs(share - (1 - frozen)) + abs((1 - share) - frozen)
            gaps.append((round(gap, 12), -cut, training))
    for _, cut, training in sorted(gaps):
        yield training, -cut
    yield every, 0


class _Splits:
    """Q for one k: the split of units among the devices of D_t that minimises the largest of C_T's sums (eq. 9).

    By dynamic programming from the last device backwards over (set of devices, first device, first unit): a stage's
    sum needs to know no more of what follows than the device that it sends to. Memory: as in `pipelines`.
    """

    def __init__(self, case: Case):
        self.case, self.pace = case, case.pace
        self.units = case.pace.both.shape[1] - 1
        self.devices = range(len(case.pace.both))
        self.hops = self.pace.hop + self.pace.late
        self.ways = np.where(np.arange(self.units + 1) > case.bytes.problem.work.lowest, 2.0, 1.0)
        self.reach = [case.reach(n) for n in range(len(self.devices) + 1)]
        self.behind = [case.reach(n, case.waiting) for n in range(len(self.devices) + 1)]
        self.known: dict[tuple[int, int], Array] = {}

    def best(self, training: int, cut: int) -> Split | None:
        """C and Q_t; None where memory does not suffice for D_t, or for the prefix on one of D_f."""
        frozen = [d for d in self.devices if not training >> d & 1]
        prefix = self.case.bytes.needed((), self.case.k, 0)[0, cut] if cut else 0.0
        if any(self.case.bytes.room[d] < prefix for d in frozen):
            return None
        found = [(self._c(training, frozen, first, cut), first) for first in bits(training)]
        c, first = min(found)
        return None if math.isinf(c) else (c, self._trace(training, first, cut))

    def _c(self, training: int, frozen: Sequence[int], first: int, cut: int) -> float:
        """C of a step, max of C_T and C_F, for the best Q_t that begins on `first`."""
        c_t = self.case.full * float(self._stage(training, first, cut, bool(cut)).min())
        if not frozen:
            return c_t
        each = [float(self.pace.forward[d, cut] + self.hops[d, first]) for d in frozen]
        return max(c_t, *(n * s for n, s in zip(deal(self.case.full, each), each, strict=True)))

    def _stage(self, mask: int, device: int, start: int, behind: bool = False) -> Array:
        """The largest sum, by where a first stage on a device ends, of it and all that follow: (units + 1,)."""
        n, rest = mask.bit_count(), mask ^ 1 << device
        reach = int((self.behind if behind else self.reach)[n][device, start])
        own = self.pace.both[device] - self.pace.both[device, start]
        sums = np.full(self.units + 1, np.inf)
        if not rest:
            sums[self.units] = own[self.units] if reach >= self.units and start < self.units else np.inf
            return sums
        for d in bits(rest):
            after = np.maximum(self._least(rest, d), own + self.ways * self.hops[device, d])
            sums = np.minimum(sums, after)
        sums[: start + 1] = np.inf
        sums[reach + 1 :] = np.inf
        return sums

    def _least(self, mask: int, device: int) -> Array:
        """The least largest sum of stages that begin on a device, by their first unit: (units + 1,)."""
        if (mask, device) not in self.known:
            found = [float(self._stage(mask, device, i).min()) for i in range(self.units)]
            self.known[mask, device] = np.array([*found, np.inf])
        return self.known[mask, device]

    def _trace(self, mask: int, device: int, start: int) -> Stages:
        stages: Stages = []
        behind = start > 0
        while True:
            stop = int(self._stage(mask, device, start, behind).argmin())
            stages.append((device, start, stop))
            mask ^= 1 << device
            if not mask:
                return stages
            hops = self.ways[stop] * self.hops[device]
            own = self.pace.both[device, stop] - self.pace.both[device, start]
            nearest = [(float(max(self._least(mask, d)[stop], own + hops[d])), d) for d in bits(mask)]
            device, start, behind = min(nearest)[1], stop, False


def _group(problem: Problem, tasks: tuple[str, ...], training: int, cut: int, k: int, q: Stages) -> Group:
    names = list(problem.fleet.devices)
    frozen = [n for d, n in enumerate(names) if not training >> d & 1]
    return Group(
        tasks=tasks,
        form="pipeline" if len(q) > 1 else "single",
        trainers=tuple(Part(device=names[d], start=a, stop=b) for d, a, b in q),
        size=k,
        ahead="streamed" if cut else "none",
        prefix=tuple(Part(device=n, start=0, stop=cut) for n in frozen),
        cut=cut,
    )
