"""What a fleet lacks when nothing fits: the error says which device comes nearest, and by how much it is too small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contextlora.errors import PlanError
from contextlora.gear.cost import Problem
from contextlora.gear.tables import Array, Bytes, Case, Pace
from contextlora.gear.units import show_bytes
from contextlora.gear.work import TaskLoad


def nothing_fits(problem: Problem, tasks: Sequence[TaskLoad], sizes: Sequence[int]) -> PlanError:
    """E406 for a stage, with the least bytes that are missing, over all pipelines of all its tasks."""
    names, step = ", ".join(t.name for t in tasks), len(tasks) * problem.work.batch
    allowed = [k for k in sizes if 0 < k <= step]
    if not allowed:
        text = f"no micro-batch of {', '.join(map(str, sizes))} samples is within a step of {step}; allow a smaller one"
        return PlanError("E406", text, where=names)
    size = Bytes(problem)
    devices = list(problem.fleet.devices)
    found = [(*_least(Case(size, Pace(problem, k), tasks)), k) for k in allowed]
    _, lacking, k = min(found, key=lambda f: (f[0], f[2]))
    named = [f"'{devices[d]}' lacks {show_bytes(lacking[d])}" for d in sorted(lacking, key=lambda d: -lacking[d])]
    text = (
        f"nothing fits the devices' memory. Nearest comes a pipeline with micro-batches of {k}, where "
        f"{', '.join(named)}. More memory there, another device, fewer ranks, a smaller micro-batch or weights of "
        "fewer bits would help"
    )
    return PlanError("E406", text, where=names)


def _least(case: Case) -> tuple[float, dict[int, float]]:
    """The least sum of missing bytes over all pipelines, and where it is missing: {device: bytes}.

    From the last stage backwards, as in `pipelines`, with missing bytes in place of seconds.
    """
    room, units = case.bytes.room, len(case.bytes.weights)
    devices = range(len(room))
    after = np.arange(units + 1) > np.arange(units)[:, None]
    start: Array = np.where(np.arange(units + 1) == units, 0.0, np.inf)
    least: dict[int, Array] = {0: start}
    for mask in range(1, 1 << len(room)):
        needed = case.bytes.needed(case.tasks, case.k, min(mask.bit_count(), case.full))
        best = np.full(units + 1, np.inf)
        for d in devices:
            if mask >> d & 1:
                over = np.where(after, np.maximum(needed - room[d], 0.0), np.inf)
                best[:units] = np.minimum(best[:units], (over + least[mask ^ 1 << d]).min(-1))
        least[mask] = best
    return _trace(case, least)


def _trace(case: Case, least: dict[int, Array]) -> tuple[float, dict[int, float]]:
    mask = min(least, key=lambda m: (float(least[m][0]), m.bit_count(), m))
    total, start, lacking = float(least[mask][0]), 0, {}
    while mask:
        needed = case.bytes.needed(case.tasks, case.k, min(mask.bit_count(), case.full))[start, start + 1 :]
        ways = []
        for d in range(len(case.bytes.room)):
            if mask >> d & 1:
                over = np.maximum(needed - case.bytes.room[d], 0.0)
                sums = over + least[mask ^ 1 << d][start + 1 :]
                ways.append((float(sums.min()), d, start + 1 + int(sums.argmin()), float(over[int(sums.argmin())])))
        _, d, start, over_here = min(ways)
        if over_here > 0:
            lacking[d] = over_here
        mask ^= 1 << d
    return total, lacking
