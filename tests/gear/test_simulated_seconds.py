"""Seconds of whole stages and plans by the simulator, and how near the analytic model comes to them."""

from __future__ import annotations

import random
import statistics

import groups
import pytest
import small

from contextlora.gear.plan import Plan
from contextlora.gear.schedule import schedule
from contextlora.gear.simulate import play, simulate, simulated_seconds


def test_groups_at_once_share_the_medium_only():
    p = groups.with_cut(small.problem(4, 6, lowest=1, seed=6), 3e7)
    a = groups.group("pipeline", ("d0", 0, 3), ("d1", 3, 6), tasks=("t0",), size=1)
    b = groups.group("pipeline", ("d2", 0, 3), ("d3", 3, 6), tasks=("t1",), size=1)
    slow, fast = (groups.rewired(p, rate=r, delay=0.0) for r in (5e6, 1e30))
    for problem, grows in ((slow, True), (fast, False)):
        alone = [simulate(problem, [g], 3).seconds for g in (a, b)]
        both = simulate(problem, [a, b], 3)
        together = [sum(s) for s in both.steps]
        assert all(t > 1.2 * x if grows else t == pytest.approx(x) for t, x in zip(together, alone, strict=True))
        whole = simulated_seconds(problem, groups.planned(problem, a, b))
        apart = [simulated_seconds(problem, groups.planned(problem, g)) for g in (a, b)]
        assert whole > 1.2 * max(apart) if grows else whole == pytest.approx(max(apart))


@pytest.mark.parametrize("seed", range(4))
def test_groups_at_once_take_all_their_air_where_the_medium_binds(seed):
    p = groups.rewired(groups.with_cut(small.problem(4, 6, lowest=1, seed=seed), 1e8), rate=1e6, delay=0.0)
    a = groups.group("pipeline", ("d0", 0, 3), ("d1", 3, 6), tasks=("t0",), size=1)
    b = groups.group("pipeline", ("d2", 0, 2), ("d3", 2, 6), tasks=("t1",), size=1)
    stage = groups.planned(p, a, b)
    assert stage.seconds == pytest.approx(sum(g.predicted.air for g in stage.groups))
    assert stage.seconds > 1.2 * max(g.predicted.seconds for g in stage.groups)
    assert simulated_seconds(p, stage) == pytest.approx(stage.seconds, rel=0.02)


def test_a_stage_is_its_steps_one_after_another():
    """Extrapolated seconds against every single step played."""
    p = small.problem(3, 8, lowest=3, tasks=1, seed=8, epochs=40)
    g = groups.group("single", ("d0", 3, 8), tasks=("t0",), size=1, prefix=[("d1", 0, 3)], ahead="streamed", cut=3)
    steps = p.work.updates(p.loads["t0"]) * p.work.epochs
    played = sum(simulate(p, [g], steps).steps[0])
    assert simulated_seconds(p, groups.planned(p, g)) == pytest.approx(played, rel=1e-6)


def test_a_stage_with_tasks_of_different_lengths():
    """A pipeline that is empty between steps: intervals simply add up."""
    p = small.problem(2, 6, lowest=1, tasks=3, seed=12, epochs=3)
    g = groups.group("pipeline", ("d0", 0, 3), ("d1", 3, 6), tasks=tuple(p.loads), size=2)
    wanted = sum(
        steps * play(p, [schedule(p, g, active * p.work.batch // 2)], [1]).seconds
        for steps, active, _ in p.work.intervals(list(p.loads.values()))
    )
    stage = groups.planned(p, g)
    assert simulated_seconds(p, stage) == pytest.approx(wanted)
    whole = {"planner": "by hand", "fleet": "f", "model": "m", "units": 6, "seconds": 2 * stage.seconds}
    again = Plan(stages=(stage, stage.model_copy(update={"exchange": 5.0})), **whole)
    assert simulated_seconds(p, again) == pytest.approx(2 * wanted + 5)


@pytest.mark.parametrize(("cut", "median", "worst"), [(1e6, 0.01, 0.35), (1e7, 0.02, 0.5)])
def test_the_analytic_model_is_close(cut, median, worst, record_property):
    """Seconds of a stage by `cost.predict` and by the simulator, on random groups; transfers light, then heavy."""
    off = {"all": [], "single": [], "data": [], "pipeline": []}
    for seed in range(120):
        p, g = groups.draw(seed, cut=cut)
        stage = groups.planned(p, g)
        deviation = stage.seconds / simulated_seconds(p, stage) - 1
        off["all"].append(deviation)
        off[g.form].append(deviation)
    for form, values in off.items():
        mean = statistics.median(map(abs, values))
        said = f"{len(values)} groups, median |deviation| {mean:.2%}, {min(values):+.1%} to {max(values):+.1%}"
        record_property(form, said)
        print(form, said)
    assert statistics.median(map(abs, off["all"])) < median
    assert max(map(abs, off["all"])) < worst
    assert max(map(abs, off["single"])) < 0.05


def test_side_by_side_groups_at_random():
    """No closed form: whatever contends, it ends, and nobody is faster for it than alone but by an ordering's luck."""
    for seed in range(20):
        r = random.Random(seed)
        p = groups.with_cut(small.problem(4, 7, tasks=2, lowest=2, seed=seed), r.choice([1e6, 1e7]))
        a = groups.group("pipeline", ("d0", 0, 4), ("d1", 4, 7), tasks=("t0",), size=r.choice([1, 2]))
        b = groups.group("data", ("d2", 0, 7), ("d3", 0, 7), tasks=("t1",), size=1)
        apart = [simulated_seconds(p, groups.planned(p, g)) for g in (a, b)]
        assert simulated_seconds(p, groups.planned(p, a, b)) >= 0.98 * max(apart)
