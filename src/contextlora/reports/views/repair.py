"""One task's answers poisoned, then repaired: how much comes back, and at what cost (ContextLoRA section VII-B)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np

from contextlora.reports.charts import lines
from contextlora.reports.grids import Grid, Rows, Section, plain_table
from contextlora.reports.jobs import Point
from contextlora.reports.kinds import Style
from contextlora.reports.statistics import difference, mean
from contextlora.reports.tables import Findings, Result, matrix, paired, place

STAGES = {  # by step, its column: with blocks and without, the third step touches the one task, the fourth the rest
    "clean": "clean",
    "poisoned": "poisoned",
    "repaired": "repaired or continued",
    "continued": "repaired or continued",
    "descendants": "descendants or retrained",
    "retrained": "descendants or retrained",
}
COLUMNS = tuple(dict.fromkeys(STAGES.values()))
MARKED = "* where the interval excludes 0"
COSTS = {
    "trained_parameters": ("trained parameters", 0),
    "updates": ("updates of a parameter", 0),
    "samples": ("samples seen", 0),
    "train_seconds": ("training, s", 1),
}
NOTE = (
    "All training answers of one task are shuffled among themselves. With a block for each task, that block is reset "
    "and trained again on the clean answers (repaired), then the blocks that were trained on top of it (descendants). "
    "A joint adapter goes on with the clean answers of that task alone (continued), or is trained from scratch on all "
    "(retrained, which is the clean training again). Means with 95 % intervals over seeds and items drawn together."
)
COST_NOTE = (
    "Means over seeds. Clean and poisoned are not part of a repair. Every method sees each sample once an epoch. The "
    "poisoned training's seconds hold the layers below the blocks too, which the others share and have computed "
    "before."
)


def sections(findings: Findings) -> list[Section]:
    """Accuracy at every step with a figure for each arm, what is still lost, ours against others, and the costs."""
    style = findings.kind.style
    against = replace(style, signed=True, against=0.0)
    tables = [
        _grid(findings, "accuracy at every step", _accuracy(findings), style),
        _grid(findings, f"against clean training; {MARKED}", _lost(findings), against),
        _grid(findings, f"{findings.recipe.ours} minus each other; {MARKED}", _ahead(findings), against),
    ]
    costs = plain_table(*costs_of_steps(findings))
    return [
        Section("What was found", tables, _figures(findings), note=NOTE),
        Section("What each step cost", below=costs, note=COST_NOTE),
    ]


def _grid(findings: Findings, title: str, rows: Rows, style: Style) -> Grid:
    heads = ["scenario", *findings.recipe.sweep, "task", "arm"]
    return Grid(title, heads, rows.columns(COLUMNS), rows.found, style, findings.recipe.seeds)


def _arms(findings: Findings) -> Iterator[tuple[str, Point, str, Mapping[int, Result]]]:
    """Scenario, point, arm and its results by seed."""
    for (scenario, point), arms in findings.cells.items():
        for arm, results in arms.items():
            yield scenario, point, arm, results


def _accuracy(findings: Findings) -> Rows:
    rows = Rows()
    for scenario, point, arm, results in _arms(findings):
        for task, (stage, part) in product(findings.tasks(scenario), stages(results).items()):
            rows.add(place(scenario, point, task, arm), stage, mean(matrix(results, task, part)[0]))
    return rows


def _lost(findings: Findings) -> Rows:
    """Every step minus the clean one, by the same arm."""
    rows = Rows()
    for scenario, point, arm, results in _arms(findings):
        for task, (stage, part) in product(findings.tasks(scenario), stages(results).items()):
            if part:
                change = difference(*paired(results, results, task, (part, "")))
                rows.add(place(scenario, point, task, arm), stage, change)
    return rows


def _ahead(findings: Findings) -> Rows:
    """Ours minus every other arm at the step in the same place."""
    rows, ours = Rows(), findings.recipe.ours
    for scenario, point, arm, results in _arms(findings):
        mine = findings.cells[scenario, point].get(ours, {})
        shared = stages(mine).keys() & stages(results).keys() if arm != ours else set[str]()
        for task, stage in product(findings.tasks(scenario), shared):
            one, other = paired(mine, results, task, (stages(mine)[stage], stages(results)[stage]))
            if one.size:
                rows.add(place(scenario, point, task, arm), stage, difference(one, other))
    return rows


def _figures(findings: Findings) -> list[tuple[str, str]]:
    """For each arm, one line for each task over the steps."""
    found = []
    for scenario, point, arm, results in _arms(findings):
        parts = stages(results).values()
        series = {
            task: {part or "clean": mean(matrix(results, task, part)[0]) for part in parts}
            for task in findings.tasks(scenario)
        }
        title = ", ".join([*place(scenario, point, arm), f"{poisoned(results)} poisoned"])
        found.append((title, lines(series, findings.kind.label, "step")))
    return found


def stages(results: Mapping[int, Result]) -> dict[str, str]:
    """By column, the part of an arm's results that stands in it, in the order of the steps."""
    found = {"clean": ""} if results else {}
    for result in results.values():
        found |= {STAGES[step]: step for step in result["parts"]}
    return found


def poisoned(results: Mapping[int, Result]) -> str:
    """The task whose answers were shuffled."""
    return str(next(iter(results.values()))["detail"]["poisoned"])


def costs_of_steps(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of costs, means over seeds."""
    rows = []
    for scenario, point, arm, results in _arms(findings):
        detail = next(iter(results.values()))["detail"]
        for part in stages(results).values():
            each = [r["part_cost"][part] if part else r["cost"] for r in results.values()]
            numbers = [f"{np.mean([e[c] for e in each]):,.{digits}f}" for c, (_, digits) in COSTS.items()]
            step = part or "clean"
            rows.append([*place(scenario, point, arm, step, ", ".join(detail["trained"][step])), *numbers])
    heads = ["scenario", *findings.recipe.sweep, "arm", "step", "trained tasks", *(name for name, _ in COSTS.values())]
    return heads, rows
