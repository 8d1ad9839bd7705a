"""What a group costs: seconds, bytes on the air, memory. The one model that planners minimise and plans report.

Step time of a pipeline of n stages (SEMANTICS section 3, and 1F1B's limit of what is in flight):

    T = fill + (M - 1) rate + floor((M - 1) / n) max(0, fill - n rate),    rate = max(slowest stage, medium)

fill: the first micro-batch through all stages and back; medium: what one micro-batch moves over a shared medium, or
over the busiest dedicated link. The first stage has n micro-batches in flight, so that another waits until the first of
them is back: n of them take no less than the fill. Later stages' limits, which bind less often, are left out, and a
first stage without blocks, whose outputs wait for receives instead, counts as if it had this one.

Frozen prefixes stream ahead across optimizer steps, so they bound a step's time without adding to it. ContextLoRA
eqs. 9 and 10 are the stage sums here; its eq. 11 is their maximum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from contextlora.gear.fleet import Fleet
from contextlora.gear.plan import DeviceUse, Group, Part, Predicted, deal
from contextlora.gear.profile import Profile
from contextlora.gear.work import TaskLoad, Work

LEARNING = 16  # bytes a trained parameter takes: float32 value, gradient and AdamW's two moments
HELD = 4  # bytes of one that is only read
TINY = 1e-30  # seconds, where something takes none, so that shares by speed exist
QUEUE = 2  # micro-batches that wait between a prefix and its trainers
AHEAD = 16  # at most so many are taken through the frozen units while gradients are summed


@dataclass(frozen=True)
class Problem:
    """What is to be planned.

    Attributes:
        fleet: the devices.
        profiles: by device, already at that device's speed.
        work: the training.
    """

    fleet: Fleet
    profiles: Mapping[str, Profile]
    work: Work

    @cached_property
    def any_profile(self) -> Profile:
        """One of them: bytes do not depend on the device."""
        return next(iter(self.profiles.values()))

    @property
    def units(self) -> int:
        """Units of the model."""
        return len(self.any_profile.units)

    @cached_property
    def loads(self) -> dict[str, TaskLoad]:
        """All tasks by name."""
        return {t.name: t for stage in self.work.stages for t in stage}

    # --- seconds and bytes of a run of units -------------------------------------------------------------------------

    def forward(self, device: str, start: int, stop: int, k: int) -> float:
        """Seconds of a forward pass of k samples through units [start, stop)."""
        sums = self._sums(device, k)[0]
        return float(sums[stop] - sums[start])

    def backward(self, device: str, start: int, stop: int, k: int) -> float:
        """Seconds of a backward pass; units below the lowest block have none."""
        sums = self._sums(device, k)[1]
        return float(sums[stop] - sums[start])

    def _sums(self, device: str, k: int) -> tuple[Any, Any]:
        return _sums(self.profiles[device], self.fleet.devices[device].speed or 1.0, self.work, k)

    def cut(self, k: int) -> float:
        """Bytes of k samples' hidden states, which cross every boundary between units."""
        return self.any_profile.cut * k

    def returns(self, boundary: int) -> bool:
        """Whether gradients cross the boundary: some unit below it carries blocks."""
        return boundary > self.work.lowest

    def slice_bytes(self, tasks: Iterable[str], start: int = 0, stop: int | None = None) -> float:
        """Bytes (float32) of the ranks that learn for `tasks` in units [start, stop)."""
        return 4.0 * self._width(start, self.units if stop is None else stop) * sum(self.loads[t].ranks for t in tasks)

    def _width(self, start: int, stop: int) -> int:
        w = self.work
        low, high = max(start, w.lowest), min(stop, w.highest + 1)
        return sum(u.width for u in self.any_profile.units[low:high])

    # --- memory ------------------------------------------------------------------------------------------------------

    def memory(self, part: Part, tasks: Sequence[str], k: int, in_flight: int, kept: float = 0.0) -> float:
        """Bytes that a device needs for its units: weights, blocks, optimizer, what backward waits for, `kept`.

        Args:
            in_flight: micro-batches whose backward is outstanding at once; 0 for a prefix.
        """
        units = self.any_profile.units[part.start : part.stop]
        width = self._width(part.start, part.stop)
        learns = sum(self.loads[t].ranks for t in tasks)
        active = max((self.loads[t].active for t in tasks), default=0)
        blocks = width * (LEARNING * learns + HELD * max(0, active - learns))
        saved = sum(u.saved for i, u in enumerate(units, part.start) if i >= self.work.lowest)
        moment = max(u.saved for u in units) + self.any_profile.cut  # of the one unit at work
        weights = sum(u.weights for u in units)
        return self.fleet.devices[part.device].reserved + weights + blocks + k * (in_flight * saved + moment) + kept


@lru_cache(maxsize=4096)
def _sums(profile: Profile, speed: float, work: Work, k: int) -> tuple[Any, Any]:
    """Running sums over units of forward and backward seconds, each (units + 1,)."""
    back = profile.seconds("input_grad", k).copy()
    back[work.lowest : work.highest + 1] += profile.seconds("weight_grad", k)[work.lowest : work.highest + 1]
    back[: work.lowest] = 0
    both = (profile.seconds("forward", k), back)
    forward, backward = (np.concatenate([[0.0], np.cumsum(seconds)]) / speed for seconds in both)
    return forward, backward


# --- a group's step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of a group.

    Attributes:
        seconds: in the long run, prefix streaming ahead.
        fill: seconds paid once: before the trainers' first micro-batch can begin, or in the last step, whose sum of
            gradients has no further step to hide.
        air: seconds of its transfers on a shared medium.
        busy: computing seconds by device.
        sent: bytes by device.
    """

    seconds: float
    fill: float
    air: float
    busy: dict[str, float]
    sent: dict[str, float]


def step(problem: Problem, group: Group, micro: int, fresh: int) -> Step:
    """A step of `micro` micro-batches, of which `fresh` come from the prefix and the others from the cache."""
    busy, sent = dict.fromkeys(group.devices, 0.0), dict.fromkeys(group.devices, 0.0)
    if group.form == "data":
        trainers = _data(problem, group, micro, busy, sent)
    else:
        trainers = _pipeline(problem, group, micro, fresh, busy, sent)
    if not group.prefix:
        return Step(trainers.seconds, trainers.fill, trainers.air, busy, sent)
    ahead = _prefix(problem, group, fresh, busy, sent)
    seconds = max(trainers.seconds, ahead.seconds)
    if problem.fleet.shared:
        seconds = max(seconds, trainers.air + ahead.air)
    return Step(seconds, ahead.fill, trainers.air + ahead.air, busy, sent)


@dataclass(frozen=True)
class _Share:
    seconds: float
    air: float = 0.0
    fill: float = 0.0


def _data(p: Problem, g: Group, micro: int, busy: dict[str, float], sent: dict[str, float]) -> _Share:
    """Micro-batches dealt by speed, then the slices' gradients summed: each goes once around a ring and back.

    Meanwhile trainers run the next step's first micro-batches through the frozen units, so that a step in the long run
    takes the ring and the longest of what is left.
    """
    each = [there_and_back(p, t, g) for t in g.trainers]
    dealt = deal(micro, each)
    n, size = len(g.trainers), p.slice_bytes(g.tasks)
    for t, count, seconds in zip(g.trainers, dealt, each, strict=True):
        busy[t.device] += count * seconds
        sent[t.device] += 2 * (n - 1) / n * size
    air, ring = _ring(p, [t.device for t in g.trainers], size)
    whole = max(c * s for c, s in zip(dealt, each, strict=True))
    hidden = [min(ring, min(c, AHEAD) * frozen(p, g, t)) for t, c in zip(g.trainers, dealt, strict=True)]
    rest = max(c * s - h for c, s, h in zip(dealt, each, hidden, strict=True))
    return _Share(rest + ring, air, whole - rest)


def frozen(p: Problem, g: Group, part: Part) -> float:
    """Seconds that a data-parallel trainer takes one micro-batch through the frozen units, unless others do that."""
    return 0.0 if g.prefix else p.forward(part.device, 0, p.work.lowest, g.size)


def there_and_back(p: Problem, part: Part, g: Group) -> float:
    """Seconds of forward and backward of one micro-batch."""
    where = part.device, part.start, part.stop, g.size
    return p.forward(*where) + p.backward(*where)


def _ring(p: Problem, devices: Sequence[str], size: float) -> tuple[float, float]:
    """Air and seconds of an all-reduce: 2 (n - 1) rounds in which every device passes 1/n on to the next."""
    n, pairs = len(devices), list(zip(devices, [*devices[1:], devices[0]], strict=True))
    hops = [p.fleet.airtime(a, b, size / n) for a, b in pairs]
    late = max(p.fleet.delay(a, b) for a, b in pairs)
    rounds = 2 * (n - 1)
    each = sum(hops) if p.fleet.shared else max(hops)
    return rounds * sum(hops), rounds * (each + late)


def _pipeline(p: Problem, g: Group, micro: int, fresh: int, busy: dict[str, float], sent: dict[str, float]) -> _Share:
    """The module's T; one device is a pipeline of one stage without hops."""
    k, skipped = g.size, 0.0
    if g.ahead == "local":  # cached micro-batches begin above the prefix
        skipped = p.forward(g.trainers[0].device, 0, g.cut, k) * (1 - fresh / micro)
    stages = [there_and_back(p, t, g) for t in g.trainers]
    stages[0] -= skipped
    fill, air, slowest_hop = sum(stages), 0.0, 0.0
    for t, seconds in zip(g.trainers, stages, strict=True):
        busy[t.device] += micro * seconds
    for a, b in zip(g.trainers, g.trainers[1:], strict=False):
        size = p.cut(k)
        ways = 2 if p.returns(a.stop) else 1
        hop = p.fleet.airtime(a.device, b.device, size)
        fill += ways * (hop + p.fleet.delay(a.device, b.device))
        air += ways * hop
        slowest_hop = max(slowest_hop, hop)  # a dedicated link is full-duplex
        sent[a.device] += micro * size
        sent[b.device] += micro * size * (ways - 1)
    n, rate = len(stages), max(*stages, air if p.fleet.shared else slowest_hop)
    waits = (micro - 1) // n * max(0.0, fill - n * rate)
    return _Share(fill + (micro - 1) * rate + waits, micro * air)


def _prefix(p: Problem, g: Group, fresh: int, busy: dict[str, float], sent: dict[str, float]) -> _Share:
    """Seconds of the prefix's devices for `fresh` micro-batches dealt by speed, and of the first until it arrives."""
    k = g.size
    each = [p.forward(part.device, 0, g.cut, k) for part in g.prefix]
    hops = [sum(w * p.fleet.airtime(part.device, to, p.cut(k)) for to, w in receivers(p, g)) for part in g.prefix]
    late = [sum(w * p.fleet.delay(part.device, to) for to, w in receivers(p, g)) for part in g.prefix]
    paces = [pace(p, g, part) for part in g.prefix]
    dealt = deal(fresh, paces)
    for part, count, seconds in zip(g.prefix, dealt, each, strict=True):
        busy[part.device] += count * seconds
        sent[part.device] += count * p.cut(k)
    slowest = max(c * s for c, s in zip(dealt, paces, strict=True))
    first = min(s + h + d for s, h, d in zip(each, hops, late, strict=True))
    return _Share(slowest, sum(c * h for c, h in zip(dealt, hops, strict=True)), first)


def pace(p: Problem, g: Group, part: Part) -> float:
    """Seconds from one micro-batch of a prefix's device to its next: it computes one while another is on its way.

    Of links to several trainers, that of every one counts by the share of micro-batches that it takes.
    """
    own = p.forward(part.device, 0, g.cut, g.size)
    return sum(w * max(own, p.fleet.airtime(part.device, to, p.cut(g.size))) for to, w in receivers(p, g))


def receivers(p: Problem, g: Group) -> list[tuple[str, float]]:
    """Who receives what a prefix sends, each with its share: several data-parallel trainers by their speeds."""
    if g.form != "data":
        return [(g.trainers[0].device, 1.0)]
    speeds = [1 / max(there_and_back(p, t, g), TINY) for t in g.trainers]
    return [(t.device, s / sum(speeds)) for t, s in zip(g.trainers, speeds, strict=True)]


# --- a group's stage -------------------------------------------------------------------------------------------------


def predict(problem: Problem, group: Group) -> Predicted:
    """What a group takes for its tasks' whole training, by the analytic model."""
    loads, work = [problem.loads[t] for t in group.tasks], problem.work
    seconds = air = 0.0
    fill, busy, sent = 0.0, dict.fromkeys(group.devices, 0.0), dict.fromkeys(group.devices, 0.0)
    for steps, active, first in work.intervals(loads):
        micro = math.ceil(active * work.batch / group.size)
        fresh = math.ceil(first * work.batch / group.size) if group.cache else micro
        one = step(problem, group, micro, min(fresh, micro))
        seconds += steps * one.seconds
        air += steps * one.air
        fill = max(fill, one.fill)
        for d in group.devices:
            busy[d] += steps * one.busy[d]
            sent[d] += steps * one.sent[d]
    full = math.ceil(len(loads) * work.batch / group.size)
    memory = memory_of(problem, group, full)
    return Predicted(
        step=step(problem, group, full, full).seconds,
        cached_step=step(problem, group, full, 0 if group.cache else full).seconds,
        seconds=seconds + fill,
        air=air,
        devices={d: DeviceUse(memory=memory[d], busy=busy[d], sent=sent[d]) for d in group.devices},
    )


def memory_of(problem: Problem, group: Group, micro: int) -> dict[str, float]:
    """Bytes by device, at the worst moment of a step of `micro` micro-batches."""
    k, found, n = group.size, {}, len(group.trainers)
    waiting = QUEUE * problem.cut(k) if group.prefix else 0.0
    ahead = AHEAD * problem.cut(k) if problem.work.lowest else 0.0
    samples = sum(problem.loads[t].samples for t in group.tasks)
    cached = problem.cut(1) * samples if group.cache else 0.0
    for i, part in enumerate(group.trainers):
        in_flight = min(n - i, micro) if group.form == "pipeline" else 1
        first = waiting + cached if i == 0 else 0.0
        kept = (waiting or ahead) if group.form == "data" else first
        found[part.device] = problem.memory(part, group.tasks, k, in_flight, kept)
    for part in group.prefix:
        found[part.device] = problem.memory(part, (), k, 0)
    return found


def fits(problem: Problem, predicted: Predicted) -> bool:
    """Whether no device needs more memory than it has."""
    return all(use.memory <= problem.fleet.devices[d].memory for d, use in predicted.devices.items())


def together(problem: Problem, groups: Sequence[Predicted]) -> float:
    """Seconds of groups side by side: the longest one's, or on a shared medium the air of all, if that is longer.

    What a transfer waits for other groups' transfers is left out as long as the medium has time for all of them.
    """
    longest = max(g.seconds for g in groups)
    return max(longest, sum(g.air for g in groups)) if problem.fleet.shared else longest


def exchange(problem: Problem, tasks: Iterable[str]) -> float:
    """Seconds to give the slices trained in a stage to every other device, so that any of them may go on from there."""
    names = list(problem.fleet.devices)
    size = problem.slice_bytes(tasks)
    pairs = list(itertools.pairwise(names))  # handed on from one to the next
    hops = [problem.fleet.airtime(a, b, size) for a, b in pairs]
    late = sum(problem.fleet.delay(a, b) for a, b in pairs)
    return (sum(hops) if problem.fleet.shared else max(hops, default=0.0)) + late
