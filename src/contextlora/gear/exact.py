"""The exact planner: of all plans that `plan` can say, the one that `cost` gives the least seconds.

Stages are planned one by one. A stage takes the longest of its groups, or, on a shared medium, all their air, if that
is longer. So a plan of less than T seconds exists if and only if the tasks can be divided among disjoint sets of
devices such that every group takes less than T and their least air by groups of less than T adds up to less than T.
`divide.least_air` decides that for sets of devices by dynamic programming. The search asks it of bounds (see
`options`), to learn which unexplored groups can still matter, and explores those, until none can.

`cost` is a closed form, right to a few per cent in the middle but not always. So a judge that takes longer to ask, the
simulator, may choose for each stage among this plan and the best known ones of other kinds, which the search leaves
behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from contextlora.errors import PlanError
from contextlora.gear import explore
from contextlora.gear.cost import Problem, exchange, predict, together
from contextlora.gear.divide import Counts, fewest, least_air, minus, parts
from contextlora.gear.options import Cell, Options, Prefixes, Slot
from contextlora.gear.plan import Group, Plan, PlannedGroup, PlannedStage
from contextlora.gear.recover import group_of
from contextlora.gear.rings import Rings
from contextlora.gear.shortfall import nothing_fits
from contextlora.gear.tables import Array, Bytes, Pace, Sets
from contextlora.gear.work import TaskLoad

EQUAL = 1e-12  # relative; sums of the same seconds in another order differ less
JUDGED = 4  # plans of a stage; more gain next to nothing
NEAR = 1.5  # times the best seconds, within which others are judged: `cost` is off by less
MOST_DEVICES = 10  # 10 s; each further one takes 3 to 4 times as long, and as much memory; see `_few`


Judge = Callable[[Problem, PlannedStage], float]


def exact(problem: Problem, sizes: Sequence[int] = (1, 2, 4, 8), judge: Judge | None = None) -> Plan:
    """Plans a training in the least seconds that the model of `cost` allows.

    Of a fleet of more than MOST_DEVICES, it is the best plan on the fastest of them, as the plan's name says;
    `bound.least_seconds` tells what all of them could save at most.

    Args:
        sizes: of micro-batches, k, to choose from.
        judge: seconds of a stage by a better model, which chooses among the best plan and its rivals of other kinds.

    Raises:
        PlanError: E406 where nothing fits the devices' memory.
    """
    count = len(problem.fleet.devices)
    if count <= MOST_DEVICES:
        return _exact(problem, sizes, judge, "exact")
    name = f"exact, on the {MOST_DEVICES} {{}} of {count} devices"
    try:
        return _exact(_few(problem, sizes, _speed), sizes, judge, name.format("fastest"))
    except PlanError:
        return _exact(_few(problem, sizes, _room), sizes, judge, name.format("largest"))


def _exact(problem: Problem, sizes: Sequence[int], judge: Judge | None, planner: str) -> Plan:
    search = _Search(problem, sorted(set(sizes)))
    stages = tuple(search.stage(tasks, judge) for tasks in problem.work.stages)
    profile = problem.any_profile
    synthetic = problem.fleet.synthetic or any(p.synthetic for p in problem.profiles.values())
    return Plan(
        planner=planner,
        fleet=problem.fleet.name,
        model=profile.model,
        units=problem.units,
        stages=stages,
        seconds=sum(s.seconds for s in stages),
        synthetic=synthetic,
    )


Worth = Callable[[Problem, str, int], tuple[float, ...]]


def _few(problem: Problem, sizes: Sequence[int], worth: Worth) -> Problem:
    """The same training on those MOST_DEVICES that are worth most.

    On a shared medium a device can stand in, in any plan, for one that is no faster and has no more room. So of all
    plans of so few devices, none is lost that is better, unless it needs the room of a device that is slower.
    """
    fleet = problem.fleet
    order = sorted(fleet.devices, key=lambda d: worth(problem, d, min(sizes)), reverse=True)[:MOST_DEVICES]
    devices = {n: d for n, d in fleet.devices.items() if n in order}
    links = {pair: link for pair, link in fleet.links.items() if set(pair) <= devices.keys()}
    return Problem(
        replace(fleet, devices=devices, links=links), {n: problem.profiles[n] for n in devices}, problem.work
    )


def _speed(problem: Problem, device: str, k: int) -> tuple[float, ...]:
    units = problem.units
    seconds = problem.forward(device, 0, units, k) + problem.backward(device, 0, units, k)
    return -seconds, problem.fleet.devices[device].memory - problem.fleet.devices[device].reserved


def _room(problem: Problem, device: str, k: int) -> tuple[float, ...]:
    return _speed(problem, device, k)[::-1]


class _Search:
    """What all stages share."""

    def __init__(self, problem: Problem, sizes: Sequence[int]):
        self.problem, self.sizes = problem, sizes
        most = max(len(s) for s in problem.work.stages) * problem.work.batch
        self.sets, self.bytes = Sets(len(problem.fleet.devices)), Bytes(problem)
        self.paces = [Pace(problem, k) for k in sizes if k <= most]
        self.rings = Rings(problem.fleet)
        lowest = min(problem.work.lowest, problem.units - 1)
        self.prefixes = {p.k: Prefixes.of(self.bytes, p, self.sets, lowest) for p in self.paces} if lowest else {}

    def stage(self, tasks: Sequence[TaskLoad], judge: Judge | None) -> PlannedStage:
        """Plans one stage."""
        search = _Stage(self, tasks)
        best = self._planned(tasks, search.groups())
        if judge is None:
            return best
        return min((best, *(self._planned(tasks, g) for g in search.rivals())), key=lambda s: judge(self.problem, s))

    def _planned(self, tasks: Sequence[TaskLoad], found: Sequence[Group]) -> PlannedStage:
        groups = [PlannedGroup(group=g, predicted=predict(self.problem, g)) for g in found]
        longest = together(self.problem, [g.predicted for g in groups])
        given = exchange(self.problem, [t.name for t in tasks])
        return PlannedStage(groups=tuple(groups), exchange=given, seconds=longest + given)


class _Stage:
    """The search for one stage's groups.

    Attributes:
        best: seconds of the best plan so far.
    """

    def __init__(self, search: _Search, tasks: Sequence[TaskLoad]):
        self.search, self.sets, self.problem = search, search.sets, search.problem
        self.tasks = tasks
        self.kinds: dict[tuple[int, int, int], list[TaskLoad]] = {}
        for t in tasks:
            self.kinds.setdefault((t.samples, t.ranks, t.active), []).append(t)
        self.all: Counts = tuple(len(same) for same in self.kinds.values())
        self.options = {c: self._options(c) for c in parts(self.all)}
        self.cells: dict[Counts, list[Cell]] = {c: [] for c in self.options}
        self.best = np.inf

    def _options(self, counts: Counts) -> Options:
        s = self.search
        tasks = [t for n, same in zip(counts, self.kinds.values(), strict=True) for t in same[:n]]
        return Options(s.bytes, s.paces, s.sets, s.prefixes, tasks, s.rings, counts == self.all)

    def groups(self) -> list[Group]:
        """The best groups."""
        for o in self.options.values():
            explore.without_prefix(o)
        self._improve()
        every = np.full(self.sets.full + 1, True)
        for c, o in self.options.items():
            if o.lowest:
                explore.streamed_without_pipeline(o, self.best, every)
            self._improve()
            if self.sets.devices > 1:
                for k in o.cases:
                    self._begin(c, o, k, every)
                    self._improve()
        while self._refine():
            pass
        if np.isinf(self.best):
            raise nothing_fits(self.problem, self.tasks, self.search.sizes)
        return [group for group, _ in self._build()]

    def rivals(self) -> Iterator[list[Group]]:
        """After `groups`: the best ones known without the kind of the group that takes longest, again and again."""
        near, found = self.best * NEAR, self._build()
        for _ in range(JUDGED - 1):
            slowest = max(found, key=lambda f: predict(self.problem, f[0]).seconds)[1]
            for o in self.options.values():
                o.seconds[[_kind(s) == _kind(slowest) for s in o.slots]] = np.inf
            self.best = near
            self._improve()
            if self.best == near:
                return
            found = self._build()
            yield [group for group, _ in found]

    # --- exploring ---------------------------------------------------------------------------------------------------

    def _begin(self, counts: Counts, o: Options, k: int, useful: Array) -> None:
        """The first cell: as a group's seconds are at least those of all its micro-batches on the slowest stage."""
        case = o.cases[k]
        taus = case.pace.taus
        most = self.best / float((case.steps * case.micro).sum())
        last = min(len(taus), int(np.searchsorted(taus, most, side="right"))) - 1
        if last >= 0:
            probe = o.pipelines[k].probe(float(taus[last]))
            made = explore.cell(o, k, (0, last), probe, None, self._limit(), useful)
            self.cells[counts].append(made)

    def _limit(self) -> float:
        """What a plan must stay below to be better."""
        return self.best * (1 - EQUAL)

    def _refine(self) -> bool:
        """Splits the most promising cells. False if no unexplored group can make a better plan."""
        limit = self._limit()
        lowest = {c: self._least_air(c, limit, bounds=True) for c in self.options}
        air = least_air(self.sets, self.all, lowest)
        if not air[self.all][self.sets.full] < limit:
            return False
        found: list[tuple[float, int, Counts, Cell]] = []
        for c, o in self.options.items():
            rest = air[minus(self.all, c)][::-1]  # on the devices that are left
            known = self._least_air(c, limit)
            kept: list[Cell] = []
            for cell in self.cells[c]:
                own = o.air[o.part[cell.k], None]
                possible = (cell.lower < limit) & (own + rest < limit)
                if possible.any():
                    kept.append(cell)
                    possible &= own < known
                    if cell.first < cell.last and possible.any():
                        found.append((float(cell.lower[possible].min()), len(found), c, cell))
            self.cells[c] = kept
        found.sort(key=lambda f: f[:2])
        for _, _, c, cell in found[: 1 + len(found) // 4]:
            rest = air[minus(self.all, c)][::-1]
            self.cells[c].remove(cell)
            self._split(c, cell, rest < limit)
        self._improve()
        return bool(found)

    def _split(self, counts: Counts, cell: Cell, useful: Array) -> None:
        o, middle = self.options[counts], (cell.first + cell.last) // 2
        probe = o.pipelines[cell.k].probe(float(o.cases[cell.k].pace.taus[middle]))
        limit = self._limit()
        self.cells[counts] += [
            explore.cell(o, cell.k, (cell.first, middle), probe, cell.below, limit, useful),
            explore.cell(o, cell.k, (middle + 1, cell.last), cell.probe, probe, limit, useful),
        ]

    # --- dividing ----------------------------------------------------------------------------------------------------

    def _least_air(self, counts: Counts, limit: float, bounds: bool = False, inclusive: bool = False) -> Array:
        """The least air of a group that takes less than `limit`, by the devices that it may use; inf for none."""
        o = self.options[counts]
        seconds = o.seconds
        if bounds:
            seconds = seconds.copy()
            for cell in self.cells[counts]:
                seconds[o.part[cell.k]] = np.minimum(seconds[o.part[cell.k]], cell.lower)
        fast = seconds <= limit if inclusive else seconds < limit
        return self.sets.within(np.where(fast, o.air[:, None], np.inf).min(0, initial=np.inf))

    def _improve(self) -> None:
        """Finds the best plan of the groups known: the least T, of all groups' seconds, that their air allows."""
        if not self._total(self._limit(), inclusive=False) < self._limit():
            return
        every = np.concatenate([o.seconds[o.seconds < self.best] for o in self.options.values()])
        values = np.unique(every)
        low, high = 0, len(values) - 1  # the smallest index whose air fits within
        while low < high:
            middle = (low + high) // 2
            if self._total(float(values[middle])) <= values[middle]:
                high = middle
            else:
                low = middle + 1
        best = max(float(values[low]), self._total(float(values[low])))
        if low:  # faster groups only, which then wait for the medium
            best = min(best, self._total(float(values[low - 1])))
        self.best = min(self.best, best)

    def _total(self, limit: float, inclusive: bool = True) -> float:
        least = {c: self._least_air(c, limit, inclusive=inclusive) for c in self.options}
        return float(least_air(self.sets, self.all, least)[self.all][self.sets.full])

    # --- the plan ----------------------------------------------------------------------------------------------------

    def _build(self) -> list[tuple[Group, Slot]]:
        """The groups of the best plan with their slots; of several, one of the fewest devices among those explored."""
        limit = self.best * (1 + EQUAL)
        quick = {c: np.where(o.seconds <= limit, o.air[:, None], np.inf) for c, o in self.options.items()}
        by_mask = {c: q.min(0, initial=np.inf) for c, q in quick.items()}
        left, groups = [list(same) for same in self.kinds.values()], []
        for counts, mask in fewest(self.sets, self.all, by_mask, limit):
            o, tasks = self.options[counts], [t.name for n, same in zip(counts, left, strict=True) for t in same[:n]]
            left = [same[n:] for n, same in zip(counts, left, strict=True)]
            slot = min(
                np.flatnonzero(quick[counts][:, mask] <= by_mask[counts][mask]), key=lambda s: (o.seconds[s, mask], s)
            )
            groups.append((group_of(self.problem, o, int(slot), mask, tuple(tasks), limit), o.slots[slot]))
        return groups


def _kind(s: Slot) -> tuple[str, int, bool]:
    """Kinds of groups about which `cost` may err differently."""
    return s.kind, s.k, s.stages > 1
