"""Seconds that no plan can take less than, under the model of `cost`, for fleets of any size.

Two truths about a stage, whatever its groups, forms, cuts, prefixes and caches are:

* Every pass of a sample through a unit is done by some device, at best in the micro-batch that suits it, and no device
  computes for longer than the stage takes. So if all devices shared all units' work without a loss, they would need

      T >= sum over units of w_j / sum over devices of rho_d,    w_j = min over d of W_j(d),  rho_d = max over j of w_j / W_j(d)

  where W_j(d) are the seconds of all of unit j's passes on device d. (If d does a share x_jd of them, its T is at least
  sum over j of x_jd W_j(d), and rho_d T at least sum over j of x_jd w_j; the shares of every unit add up to one.)
* Updates come one after another, and each takes at least one micro-batch through all units that owe a gradient, forward
  and back, on the fastest device for each.

Nothing is said of the network, so that on slow links no plan comes near.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contextlora.gear.cost import Problem
from contextlora.gear.tables import Array
from contextlora.gear.work import TaskLoad


def least_seconds(problem: Problem, sizes: Sequence[int] = (1, 2, 4, 8)) -> float:
    """A bound from below on `Plan.seconds`, over all plans with micro-batches of one of `sizes`."""
    return sum(_stage(problem, tasks, sizes) for tasks in problem.work.stages)


def _stage(problem: Problem, tasks: Sequence[TaskLoad], sizes: Sequence[int]) -> float:
    work = problem.work
    lowest = min(work.lowest, problem.units - 1)
    forward = {k: _units(problem, k, back=False) for k in sizes}
    both = {k: forward[k] + _units(problem, k, back=True) for k in sizes}
    once = sum(work.updates(t) * work.batch for t in tasks)  # samples of an epoch; a last update counts as a full one
    passes = np.full(problem.units, float(once * work.epochs))
    passes[:lowest] = once  # a cache may save the later epochs'
    seconds = passes * np.minimum.reduce([both[k] / k for k in sizes])  # (devices, units)
    least = seconds.min(0)
    shares = np.divide(least, seconds, out=np.ones_like(seconds), where=seconds > 0).max(1)
    steps = max(work.updates(t) for t in tasks) * work.epochs
    one = min(float(both[k].min(0)[lowest:].sum()) for k in sizes)
    return max(float(least.sum() / shares.sum()), steps * one)


def _units(problem: Problem, k: int, *, back: bool) -> Array:
    """Seconds of a micro-batch forward, or back, by device and unit."""
    passed = problem.backward if back else problem.forward
    ends = range(problem.units)
    return np.array([[passed(d, j, j + 1, k) for j in ends] for d in problem.fleet.devices])
