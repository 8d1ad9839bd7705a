"""Seconds that no plan can take less than, under the model of `cost`, for fleets of any size.

Two truths about a stage, whatever its groups, forms, cuts, prefixes and caches are:

* Every pass of a sample through a unit is done by some device, at best in the micro-batch that suits it, and no device
  computes for longer than the stage takes. So if all devices shared all units' work without a loss, they would need

      T >= sum of w_j / sum of rho_d,    w_j = min over d of W_j(d),    rho_d = max over j of w_j / W_j(d)

  where W_j(d) are the seconds of all of unit j's passes on device d. (If d does a share x_jd of them, its T is at least
  sum over j of x_jd W_j(d), and rho_d T at least sum over j of x_jd w_j; the shares of every unit add up to one.)
* Updates come one after another, and each takes at least one micro-batch through all units that owe a gradient, forward
  and back, on the fastest device for each.
* On a shared medium, help takes air. Each group has one trainer for nothing; each of m others takes at least a seconds,
  either for its boundary, which all samples of a task cross, or to sum a task's slices update after update. A sample's
  frozen units below the blocks can run elsewhere than on trainers for h seconds of air, that of its hidden states. With
  f seconds for them, f_all for all samples once (a cache may save later epochs), w for the units that owe gradients,
  and R the rho of the best trainers together,

      T R >= w + f_all - f (T - m a) / h,    T >= m a,    T R >= w,    for the m that allows the least T.

On dedicated links nothing is said of the network, so that on slow ones no plan comes near.
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
    bounds = [float(least.sum() / shares.sum()), steps * one]
    if problem.fleet.shared and len(shares) > 1:
        trained, frozen = float(least[lowest:].sum()), float(least[:lowest].sum())
        bounds.append(_by_air(problem, tasks, trained, frozen, once, shares))
    return max(bounds)


def _by_air(
    problem: Problem, tasks: Sequence[TaskLoad], trained: float, frozen: float, samples: int, shares: Array
) -> float:
    """The module's last bound; `trained` is w, `frozen` f_all, `samples` how many f_all is for."""
    fleet, work = problem.fleet, problem.work
    a, b = list(fleet.devices)[:2]
    hidden = fleet.airtime(a, b, problem.cut(1))
    another = min(
        work.updates(t) * work.epochs * min(work.batch * hidden, 2 * fleet.airtime(a, b, problem.slice_bytes([t.name])))
        for t in tasks
    )
    offload = frozen / samples / hidden if hidden else np.inf
    best, free = np.cumsum(np.sort(shares)[::-1]), min(len(tasks), len(shares))
    found = []
    for m in range(len(shares) - free + 1):
        together, air = float(best[free + m - 1]), m * another
        shared = (trained + frozen + offload * air) / (together + offload) if np.isfinite(offload) else 0.0
        found.append(max(shared, air, trained / together))
    return min(found)


def _units(problem: Problem, k: int, *, back: bool) -> Array:
    """Seconds of a micro-batch forward, or back, by device and unit."""
    passed = problem.backward if back else problem.forward
    ends = range(problem.units)
    return np.array([[passed(d, j, j + 1, k) for j in ends] for d in problem.fleet.devices])
