"""What each task loses without each block, beside its graph: is a block its task's own? (ContextLoRA section I-C)"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from contextlora.graph import TaskGraph
from contextlora.reports.charts import heat
from contextlora.reports.grids import Grid, Rows, Section, shown
from contextlora.reports.kinds import Style
from contextlora.reports.statistics import Interval, difference
from contextlora.reports.tables import Findings, paired, place
from contextlora.reports.views.accuracy import grids, means_note

LOST = Style(100, 1, higher=False, signed=True, against=0.0)
NOTE = (
    "Points of accuracy that the task of a row loses when the block of a column is masked, with the 95 % interval "
    "over seeds and items drawn together, paired: the same seed and item with and without the block. An empty cell is "
    "a block that is not on for the task. Masking all that is on for a task leaves the base model. A block that is "
    "its task's own makes a dark cell on the diagonal, and beside it only where an edge of the graph leads."
)


def sections(findings: Findings) -> list[Section]:
    """For each scenario the graph, a heat map and a table for each arm; then the accuracy with nothing masked."""
    found = []
    for (scenario, point), arms in findings.cells.items():
        graph, name = findings.graph(scenario), ", ".join(place(scenario, point))
        figures, tables = [(f"{name}, the tasks", picture(graph))], []
        for arm, results in arms.items():
            lost = points_lost(results, graph)
            if lost:
                figures.append((f"{name}, {arm}", drawn(lost, graph)))
                tables.append(_table(findings, f"{name}, {arm}: points lost by task, masked block by block", lost))
        found.append(Section(f"Points lost without a block, {name}", tables, figures, note=NOTE))
    whole = grids(findings, findings.lines, "accuracy, nothing masked", findings.kind.style)
    return [*found, Section("Nothing masked", whole, note=means_note(findings))]


def points_lost(results: Mapping[int, Any], graph: TaskGraph) -> dict[tuple[str, str], Interval]:
    """By task and masked block, accuracy with everything on minus without the block, in shares of one."""
    found = {}
    for task in graph.names:
        for block in graph.names:
            whole, without = paired(results, results, task, ("", block))
            if whole.size:
                found[task, block] = difference(whole, without)
    return found


def drawn(lost: Mapping[tuple[str, str], Interval], graph: TaskGraph) -> str:
    """The heat map of `points_lost`."""

    def said(value: Interval | float) -> str:
        assert isinstance(value, Interval)
        number, interval = shown(value, replace(LOST, digits=0))
        return f"{number}\n{interval}"

    tasks = [t for t in graph.names if any(t == task for task, _ in lost)]
    return heat(lost, tasks, graph.names, said, ("masked block", "task"))


def picture(graph: TaskGraph) -> str:
    """The graph as an image: inside the page its styles would be every figure's."""
    data = base64.b64encode(graph.to_svg().encode()).decode()
    return f'<img alt="the task graph" src="data:image/svg+xml;base64,{data}">'


def _table(findings: Findings, title: str, lost: Mapping[tuple[str, str], Interval]) -> Grid:
    rows = Rows()
    for (task, block), value in lost.items():
        rows.add([task], block, value)
    columns = list(dict.fromkeys(block for _, block in lost))
    return Grid(title, ["task"], columns, rows.found, LOST, findings.recipe.seeds)
