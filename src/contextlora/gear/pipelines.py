"""Pipelines by dynamic programming, from the last stage backwards, for all sets of devices at once.

For a threshold tau on the slowest stage, the least fill of a pipeline that runs units [i, units) on exactly the set S:

    fill(S + d, i) = min over j of fill(S, j) + hop(j) + seconds of units [i, j) on d

A stage that is n-th from the end waits for min(n, M) backward passes, whatever stands before it: so its memory is
known when it is put in front, and the fill of what follows is all that a longer pipeline needs to know of it, beside

* on a shared medium, the number of hops that no gradient crosses, as all cuts have one size and all pairs one rate;
* on dedicated links, the device that it begins on; links slower than tau are not used.

This number or device is the arrays' last axis, called x. Units that a stage may take are a window (i, reach] of j, as
seconds and bytes grow with j: the minimum over windows takes log2(units) steps for all i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from contextlora.gear.tables import Array, Case, Sets, bits

PLAIN, WAITING, CACHED = 0, 1, 2  # what the first trainer keeps: nothing, a streamed prefix's queue, and a cache


@dataclass(frozen=True)
class Probe:
    """All pipelines whose stages take at most tau.

    Attributes:
        fill: by number of stages, (what the first one keeps, units + 1, sets, x); with PLAIN, others may stand before.
        joined: by stages n and device d, fill of n stages and the hop to them from d: (units + 1, sets without d, x).
    """

    tau: float
    fill: list[Array]
    joined: list[list[Array]]


class Pipelines:
    """The pipelines of a case."""

    def __init__(self, case: Case, sets: Sets):
        self.case, self.sets, self.pace = case, sets, case.pace
        devices, self.units = sets.devices, case.pace.both.shape[1] - 1
        self.lowest = min(case.bytes.problem.work.lowest, self.units - 1)
        kept = [0.0, case.waiting, case.waiting + case.cached] if self.lowest else [0.0]
        self.reach = [np.array([case.reach(n, b) for b in kept]) for n in range(devices + 1)]
        two_ways = np.arange(self.units + 1) > self.lowest
        self.ways = np.where(two_ways, 2.0, 1.0)
        self.two_ways = two_ways
        self.added = [[sets.add(n, d) for d in range(devices)] for n in range(devices)]

    def width(self, stages: int) -> int:
        """Values of x."""
        return stages if self.pace.shared else self.sets.devices

    def probe(self, tau: float) -> Probe:
        """The least fills for a threshold."""
        devices, units = self.sets.devices, self.units
        within = self.pace.within(tau)
        fill = [np.empty(0), self._last(within)]
        joined: list[list[Array]] = [[]]
        for n in range(1, devices):
            before = fill[n][PLAIN]
            reach = np.minimum(self.reach[n + 1], within)
            shape = (len(reach), units + 1, len(self.sets.of_size[n + 1]), self.width(n + 1))
            found = np.full(shape, np.inf)
            joined.append([])
            for d in range(devices):
                others, both = self.added[n][d]
                after = self.join(before[:, others], n, others, d, tau)
                joined[n].append(after)
                own = self.pace.both[d][:, None, None]
                best = _windows(after + own, reach[:, d]) - own[:units]
                x = slice(None) if self.pace.shared else slice(d, d + 1)
                found[:, :units, both, x] = np.minimum(found[:, :units, both, x], best)
            fill.append(found)
        return Probe(tau, fill, joined)

    def _last(self, within: Array) -> Array:
        """A last stage alone: fits if its window holds the end."""
        devices, units = self.sets.devices, self.units
        reach = np.minimum(self.reach[1], within)
        found = np.full((len(reach), units + 1, devices, self.width(1)), np.inf)
        for d in range(devices):
            alone = np.where(reach[:, d] >= units, self.pace.spans[d, :, units], np.inf)
            found[:, :units, d, 0 if self.pace.shared else d] = alone
        return found

    def join(self, before: Array, stages: int, others: Array, device: int, tau: float) -> Array:
        """Fill of `stages` stages and of the hop to them from a device: (units + 1, sets, x of the longer pipeline)."""
        ways, pace = self.ways[:, None, None], self.pace
        if not pace.shared:
            hops = np.where(pace.hop[device] <= tau, pace.hop[device] + pace.late[device], np.inf)
            nearest: Array = (before + ways * hops).min(-1, keepdims=True)
            return nearest
        once = pace.medium + float(pace.late.max())
        joined = np.full((len(before), len(others), stages + 1), np.inf)
        two, one = self.two_ways, ~self.two_ways
        joined[two, :, :-1] = before[two] + 2 * once
        joined[one, :, 1:] = before[one] + once
        return joined

    # --- from numbers back to stages ---------------------------------------------------------------------------------

    def trace(self, probe: Probe, mask: int, x: int, start: int, kept: int) -> list[tuple[int, int, int]]:
        """Stages (device, start, stop) of the pipeline on a set that has the least fill; earlier devices on ties."""
        stages: list[tuple[int, int, int]] = []
        within = self.pace.within(probe.tau)
        while mask.bit_count() > 1:
            n = mask.bit_count()
            reach = np.minimum(self.reach[n], within)[kept]
            found = []
            for d in bits(mask) if self.pace.shared else [x]:
                after = self.after(probe, mask, d, x)
                stop = int(reach[d, start]) + 1
                if stop > start + 1:
                    values = after[start + 1 : stop] + self.pace.both[d, start + 1 : stop] - self.pace.both[d, start]
                    found.append((float(values.min()), d, start + 1 + int(values.argmin())))
            _, d, stop = min(found)
            stages.append((d, start, stop))
            x, kept, start, mask = self.next_x(probe, mask, d, x, stop), PLAIN, stop, mask ^ 1 << d
        return [*stages, (mask.bit_length() - 1, start, self.units)]

    def after(self, probe: Probe, mask: int, device: int, x: int) -> Array:
        """Fill of all that follows a first stage on a device, by where it ends."""
        n = mask.bit_count() - 1
        others, _ = self.added[n][device]
        at = int(np.flatnonzero(others == self.sets.place[mask ^ 1 << device])[0])
        values: Array = probe.joined[n][device][:, at, x if self.pace.shared else 0]
        return values

    def next_x(self, probe: Probe, mask: int, device: int, x: int, stop: int) -> int:
        """x of what follows the first stage."""
        if self.pace.shared:
            return x if self.two_ways[stop] else x - 1
        rest = mask ^ 1 << device
        before = probe.fill[rest.bit_count()][PLAIN][stop, self.sets.place[rest]]
        pace = self.pace
        hops = np.where(pace.hop[device] <= probe.tau, pace.hop[device] + pace.late[device], np.inf)
        return int((before + self.ways[stop] * hops).argmin())


def _windows(values: Array, reach: Array) -> Array:
    """The least value over (i, reach[v, i]] for all i and kinds v of reach: (kinds, units, ...)."""
    units = reach.shape[1]
    length = reach - np.arange(units)
    best = np.full((len(reach), units, *values.shape[1:]), np.inf)
    power, longest = 1, int(length.max())
    while power <= longest:
        kind, i = np.nonzero((length >= power) & (length < 2 * power))
        if len(i):
            best[kind, i] = np.minimum(values[i + 1], values[reach[kind, i] - power + 1])
        if 2 * power <= longest:
            values = np.minimum(values[:-power], values[power:])
        power *= 2
    return best
