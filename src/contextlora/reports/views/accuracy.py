"""Accuracy by task and arm, and ours minus every other arm's (ContextLoRA, Figs. 7 to 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from contextlora.reports.charts import Series, bars, lines
from contextlora.reports.grids import Grid, Rows, Section
from contextlora.reports.jobs import Point
from contextlora.reports.kinds import Style
from contextlora.reports.statistics import Interval
from contextlora.reports.tables import ALL, Findings, Line, place

MEANS = (
    "Mean accuracy in percent with its 95 % interval, over seeds and items drawn together (10,000 bootstrap resamples)."
)
ONE_SEED = " With one seed an interval covers the choice of items alone, not another run."
PAIRED = (
    "Paired: the same seeds and the same items on both sides, drawn together. Coloured and marked * where the 95 % "
    "interval excludes 0; with many rows, one in twenty does so by chance."
)


def sections(findings: Findings) -> list[Section]:
    """What was found with a figure, and the differences."""
    style = findings.kind.style
    found = grids(findings, findings.lines, f"{findings.recipe.measure}, with 95 % intervals", style)
    title = f"{findings.differences_title}, paired; * where the interval excludes 0"
    differences = grids(findings, findings.differences, title, replace(style, signed=True, against=0.0))
    return [
        Section("What was found", found, figures(findings), note=means_note(findings)),
        Section(findings.differences_title, differences, note=PAIRED),
    ]


def means_note(findings: Findings) -> str:
    """What the means and intervals are."""
    return MEANS + ONE_SEED * any(line.value.seeds == 1 for line in findings.lines)


def grids(findings: Findings, found: Sequence[Line], title: str, style: Style) -> list[Grid]:
    """One for each scenario: a row for each arm, which may be many, a column for each task."""
    made = []
    for scenario in dict.fromkeys(line.scenario for line in found):
        rows = Rows()
        for arm in findings.recipe.arms:
            for line in (x for x in found if x.scenario == scenario and x.arm == arm):
                rows.add([*(f"{v}" for _, v in line.point), arm], line.task, line.value)
        name, heads = place(scenario, ())[0], [*findings.recipe.sweep, "method"]
        columns = rows.columns(findings.tasks(scenario))
        made.append(Grid(f"{name}: {title}", heads, columns, rows.found, style, findings.recipe.seeds))
    return made


def figures(findings: Findings) -> list[tuple[str, str]]:
    """One figure for each scenario; bars over a sweep get one for each of its points too."""
    recipe, label, found = findings.recipe, findings.kind.label, list[tuple[str, str]]()
    top = 1.05 if findings.kind.unit == "accuracy" else None
    for scenario in recipe.scenarios:
        mine = [x for x in findings.lines if x.scenario == scenario and x.task != ALL]
        if not mine:
            continue
        if recipe.figure == "lines":
            found.append((scenario, lines(_over_sweep(findings, mine), label, ", ".join(recipe.sweep))))
            continue
        for point in dict.fromkeys(x.point for x in mine):
            name = ", ".join([scenario, *(f"{k} {v}" for k, v in point)])
            found.append((name, bars(_by_task(mine, point), label, top)))
    return found


def _by_task(mine: Sequence[Line], point: Point) -> Series:
    series: dict[str, dict[str, Interval]] = {}
    for x in (x for x in mine if x.point == point):
        series.setdefault(x.arm, {})[x.task] = x.value
    return series


def _over_sweep(findings: Findings, mine: Sequence[Line]) -> Series:
    series: dict[str, dict[str, Interval]] = {}
    several = len({x.task for x in mine}) > 1
    alone = len(findings.recipe.arms) == 1
    for x in mine:
        name = x.task if alone and several else f"{x.arm}, {x.task}" if several else x.arm
        series.setdefault(name, {})[", ".join(f"{v}" for _, v in x.point)] = x.value
    return series
