"""Pictures: well-formed, complete, the same each time, and readable without colour."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import groups
import pytest
import small
from matplotlib.colors import to_rgb

from contextlora.gear import cost, picture
from contextlora.gear.plan import Plan, PlannedGroup, PlannedStage
from contextlora.gear.simulate import simulate


@pytest.fixture(scope="module")
def problem():
    return small.problem(5, 8, tasks=3, lowest=3, seed=3)


@pytest.fixture(scope="module")
def both():
    first = groups.group(
        "pipeline", ("d1", 3, 5), ("d2", 5, 8), prefix=[("d0", 0, 3)], ahead="streamed", cut=3, tasks=("t0", "t1")
    )
    return [first, groups.group("data", ("d3", 0, 8), ("d4", 0, 8), size=1, tasks=("t2",))]


def words(text):
    return [e.text for e in ET.fromstring(text).iter() if e.text and e.text.strip()]


def test_gantt(problem, both):
    text = picture.svg(picture.gantt(simulate(problem, both, 3), both, 1))
    said = words(text)
    for word in (*problem.fleet.devices, "medium", "forward", "backward", "activations sent", "gradients sent"):
        assert word in said
    assert "all-reduce, with the wait" in said
    assert text == picture.svg(picture.gantt(simulate(problem, both, 3), both, 1))


def test_gantt_of_links_has_a_row_for_each_direction_in_use():
    p = small.problem(2, 6, lowest=1, seed=3, shared=False)
    g = groups.group("pipeline", ("d0", 0, 3), ("d1", 3, 6))
    said = words(picture.svg(picture.gantt(simulate(p, [g], 2), [g], 0, 2)))
    assert {"d0 > d1", "d1 > d0"} <= set(said)
    assert "medium" not in said
    assert "all-reduce, with the wait" not in said


def test_timeline(problem, both):
    found = tuple(PlannedGroup(group=g, predicted=cost.predict(problem, g)) for g in both)
    seconds = max(f.predicted.seconds for f in found) + 30
    stage = PlannedStage(groups=found, exchange=30, seconds=seconds)
    alone = PlannedStage(groups=found[:1], exchange=0, seconds=seconds - 30)
    whole = {"planner": "by hand", "fleet": "f", "model": "m", "units": 8, "seconds": 2 * seconds - 30}
    plan = Plan(stages=(stage, alone), synthetic=True, **whole)
    said = " | ".join(words(picture.svg(picture.timeline(plan, problem.fleet))))
    for word in (*problem.fleet.devices, "t0, t1", "t2", "stage 1", "stage 2", "frozen layers ahead", "estimated"):
        assert word in said
    assert "slices exchanged" in said
    assert " of 93 MB" in said


def test_files(problem, both, tmp_path):
    made = [picture.gantt(simulate(problem, both, 1), both) for _ in range(3)]
    picture.save(made[0], tmp_path / "a.svg")
    picture.save(made[1], tmp_path / "a.png")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == picture.svg(made[2])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_kinds_stay_apart_without_colour():
    greys = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (to_rgb(c) for c, _, _ in picture._LOOKS.values())]
    assert all(a - b > 0.1 for a, b in itertools.pairwise(greys))
